"""What tests and benchmarks share of an operator: tensors, our call, eager torch's, the work.

Bytes are those that cannot be avoided: forward reads each input and writes each output once;
backward reads the gradients of the outputs and what was saved, and writes the gradients of the
inputs. Rivals that move or compute more are held against the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., Tensors]

# S and E of the method's schedule at K = 4, cut or repeated for another K.
LATENT_COEFFICIENT = 4.2346
NOISE_COEFFICIENTS = (-2.4919, -0.9249, -0.6568, -0.0121)


def default_device() -> torch.device:
    """The device that operators are tried on here: CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Draw:
    """Draws the tensors of a problem, the same ones every time on one kind of device.

    Args:
        device: Where they lie.
        dtype: Of the maps, rows and parameters.
        layout: Of the maps: "nchw" or "nhwc".
        timesteps: K.
        batch: B.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        layout: str = "nchw",
        timesteps: int = 4,
        batch: int = 1,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.timesteps, self.batch, self.rows = timesteps, batch, timesteps * batch
        self.format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        """Normal numbers; four axes make a map, which takes the layout."""
        x = torch.randn(shape, generator=self._generator, device=self.device)
        x = (x * scale + mean).to(self.dtype)
        return x.contiguous(memory_format=self.format) if len(shape) == 4 else x

    def weight(self, *shape: int) -> torch.Tensor:
        """A matrix or convolution kernel that keeps the variance of what it is applied to."""
        return self(*shape, scale=1 / math.sqrt(math.prod(shape[1:])))

    def norm(self, channels: int) -> dict[str, torch.Tensor]:
        """Scale and shift of a norm, none of them a no-op."""
        return {
            "norm_weight": self(channels, scale=0.2, mean=1.0),
            "norm_bias": self(channels, scale=0.2),
        }

    def coefficients(self) -> torch.Tensor:
        """E, in float32 whatever the dtype of the maps."""
        values = (NOISE_COEFFICIENTS * self.timesteps)[: self.timesteps]
        return torch.tensor(values, device=self.device)

    def repeat(self, shared: torch.Tensor) -> torch.Tensor:
        """K copies of B rows: row k * B + b."""
        return shared.repeat(self.timesteps, *[1] * (shared.ndim - 1))


@dataclass(frozen=True)
class Problem:
    """One call of an operator and what it is held against.

    Attributes:
        tensors: The arguments that have gradients, by name.
        run: Our call on them.
        eager: The same from torch's own functions, everything repeated and concatenated.
        flops: Of the forward pass's products; 0 where there are none.
        backward_flops: Of the backward pass's products; by default twice as many.
        constants: Names of arguments that nobody trains; left out when backward is timed.
        unsaved: Names of arguments that backward does not read.
        joined: `run`, brought into the form of `eager`; by default `run` itself.
        cut: `eager`, brought into the form of `run`; by default `eager` itself.
        exact: `eager` for float64, where plain `eager` would not fit into memory.
    """

    tensors: dict[str, torch.Tensor]
    run: Function
    eager: Function
    flops: int = 0
    backward_flops: int | None = None
    constants: tuple[str, ...] = ()
    unsaved: tuple[str, ...] = ()
    joined: Function | None = None
    cut: Function | None = None
    exact: Function | None = None

    @property
    def comparable(self) -> tuple[Function, Function]:
        """Our call and eager torch with outputs of one form."""
        return self.joined or self.run, self.cut or self.eager

    def bytes(self, outputs: Tensors) -> dict[str, int]:
        """Bytes of each direction, for outputs of `run`."""
        inputs = {name: size(tensor) for name, tensor in self.tensors.items()}
        written = sum(map(size, outputs))
        saved = sum(count for name, count in inputs.items() if name not in self.unsaved)
        grads = sum(count for name, count in inputs.items() if name not in self.constants)
        return {
            "forward": sum(inputs.values()) + written,
            "backward": written + saved + grads,
        }

    def magnitudes(self, grads: Tensors) -> dict[str, float]:
        """How large the terms are that the gradient of each constant sums up.

        A coefficient's gradient is one dot product over a whole map, and may cancel: its rounding
        is relative to the norms of the two vectors and not to what is left.

        Args:
            grads: Of the outputs.

        Returns:
            Norm by name of the constant.
        """
        largest = max(self.tensors.values(), key=torch.Tensor.numel)
        norm = math.prod(x.double().norm().item() for x in (grads[0], largest))
        return {name: norm / math.sqrt(self.tensors[name].numel()) for name in self.constants}

    def products(self) -> dict[str, int]:
        """FLOPs of each direction."""
        backward = 2 * self.flops if self.backward_flops is None else self.backward_flops
        return {"forward": self.flops, "backward": backward}


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()
