"""What is tuned: the calls that the published decoders make, and candidates for each launch."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from tiue_kernels import configs
from tiue_kernels.configs import Config

NUM_GROUPS, NUM_TOKENS = 32, 77
_ATTENTION = "cross_timestep_attention"
# Channels by level, latents' height and width, heads at each level (0: no attention there).
MODELS: dict[str, tuple[tuple[int, ...], int, tuple[int, ...]]] = {
    "sd15": ((320, 640, 1280, 1280), 64, (8, 8, 8, 0)),
    "sd21": ((320, 640, 1280, 1280), 64, (5, 10, 20, 0)),
    "sdxl": ((320, 640, 1280), 128, (0, 10, 20)),
    # For the tests: executed on a CPU in Triton's interpreter.
    "tiny": ((32, 64), 4, (2, 0)),
}


@dataclass(frozen=True)
class Problem:
    """One call of a launcher.

    Attributes:
        operator: whose.
        direction: "fwd" or "bwd".
        sizes: of the tensors, as `arguments` takes them apart.
        layout: of maps: "nchw" or "nhwc".
        dtype: name of a floating type of torch.
    """

    operator: str
    direction: str
    sizes: tuple[int, ...]
    layout: str = "nchw"
    dtype: str = "float16"

    def arguments(self, device: torch.device) -> tuple[Any, ...]:
        """Arguments of the launcher, drawn from one seed; nothing is drawn on the meta device."""
        draw = _Draw(device, getattr(torch, self.dtype), self.layout == "nhwc")
        forward = _ARGUMENTS[self.operator](draw, *self.sizes)
        if self.direction == "fwd":
            return forward
        with nothing_launched() if device.type == "meta" else nullcontext():
            outputs = launcher("triton", self.operator, "fwd")(*forward)
        return _BACKWARD[self.operator](draw, forward, outputs)

    def run(self, backend: str, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """The results of one backend's launcher."""
        results = launcher(backend, self.operator, self.direction)(*arguments)
        return results if isinstance(results, tuple) else (results,)

    def choices(self) -> list[tuple[str, Config]]:
        """Shape bucket and heuristic of each launch of the call, the forward pass's left out."""
        meta = self.arguments(torch.device("meta"))
        with configs.recorded() as seen, nothing_launched():
            self.run("triton", meta)
        return list({bucket: heuristic for _, bucket, heuristic in seen}.items())


def nothing_launched() -> AbstractContextManager[Any]:
    """Inside, launchers plan and allocate, and launch nothing."""
    from triton.runtime.jit import KernelInterface

    return mock.patch.object(KernelInterface, "__getitem__", return_value=_nothing)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def launcher(backend: str, operator: str, direction: str) -> Any:
    """One backend's launcher of an operator."""
    module = importlib.import_module(f"tiue_kernels.{backend}.{operator}")
    return getattr(module, f"{operator}_{direction}")


def problems(
    models: list[str], layouts: list[str], dtypes: list[str], timesteps: int = 4, batch: int = 1
) -> list[Problem]:
    """The distinct calls of the models' decoders.

    Args:
        models: keys of `MODELS`.
        layouts: of the maps: "nchw", "nhwc".
        dtypes: names of floating types of torch.
        timesteps: K.
        batch: B.
    """
    found: dict[Problem, None] = {}
    for model, dtype in itertools.product(models, dtypes):
        for operator, sizes in _calls(model, timesteps, batch):
            maps = operator not in (_ATTENTION, "geglu")
            for layout, direction in itertools.product(
                layouts if maps else ["nchw"], ("fwd", "bwd")
            ):
                found[Problem(operator, direction, sizes, layout, dtype)] = None
    return list(found)


def _calls(model: str, timesteps: int, batch: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Operator and sizes of every call of one decoder."""
    channels, size, heads = MODELS[model]
    hidden = channels[-1]
    for level in reversed(range(len(channels))):
        own, before = channels[level], channels[max(level - 1, 0)]
        extent = size >> level
        for skip in (own, own, before):
            yield "shared_skip_group_norm_silu", (timesteps, batch, hidden, skip, extent)
            hidden = own
        yield "broadcast_add_group_norm_silu", (timesteps, batch, own, extent)
        if heads[level]:
            tokens = extent * extent
            for keys in (NUM_TOKENS, tokens):
                yield _ATTENTION, (timesteps, batch, tokens, keys, own, heads[level])
            yield "geglu", (timesteps * batch, tokens, 4 * own)
    yield "timestep_sum_group_norm_silu", (timesteps, batch, channels[0], size)


class _Draw:
    """Draws tensors of one dtype and layout."""

    def __init__(self, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
        self.device, self.dtype = device, dtype
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.generator = None
        if device.type != "meta":
            self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        x = torch.randn(shape, device=self.device, generator=self.generator).to(self.dtype)
        return x.contiguous(memory_format=self.format) if x.ndim == 4 else x

    def like(self, x: torch.Tensor) -> torch.Tensor:
        return self(*x.shape)


def _shared_skip(draw: _Draw, k: int, b: int, hidden: int, skip: int, size: int) -> tuple[Any, ...]:
    maps = (draw(k * b, hidden, size, size), draw(b, skip, size, size))
    return *maps, NUM_GROUPS, draw(hidden + skip), draw(hidden + skip), 1e-5


def _broadcast_add(draw: _Draw, k: int, b: int, channels: int, size: int) -> tuple[Any, ...]:
    maps = (draw(k * b, channels, size, size), draw(b, channels, size, size))
    rest = (draw(k * b, channels), NUM_GROUPS, draw(channels), draw(channels))
    return *maps, *rest, 1e-5, False


def _timestep_sum(draw: _Draw, k: int, b: int, channels: int, size: int) -> tuple[Any, ...]:
    hidden = draw(k * b, channels, size, size)
    return hidden, draw(k).float(), NUM_GROUPS, draw(channels), draw(channels), 1e-5


def _attention(
    draw: _Draw, k: int, b: int, tokens: int, keys: int, channels: int, heads: int
) -> tuple[Any, ...]:
    rows = b if keys == NUM_TOKENS else k * b
    query = draw(k * b, tokens, channels)
    scale = (channels // heads) ** -0.5
    return query, draw(rows, keys, channels), draw(rows, keys, channels), heads, scale, None


def _geglu(draw: _Draw, rows: int, tokens: int, channels: int) -> tuple[Any, ...]:
    return (draw(rows, tokens, 2 * channels),)


_ARGUMENTS: dict[str, Any] = {
    "shared_skip_group_norm_silu": _shared_skip,
    "broadcast_add_group_norm_silu": _broadcast_add,
    "timestep_sum_group_norm_silu": _timestep_sum,
    _ATTENTION: _attention,
    "geglu": _geglu,
}
# Arguments of backward, of forward's arguments and results.
_BACKWARD: dict[str, Any] = {
    "shared_skip_group_norm_silu": lambda draw, args, out: (
        *(draw.like(out[0]), draw.like(out[1])),
        *(*args[:-1], *out[2:]),
    ),
    "broadcast_add_group_norm_silu": lambda draw, args, out: (
        *(draw.like(out[0]), *args[:6], args[7], out[1]),
    ),
    "timestep_sum_group_norm_silu": lambda draw, args, out: (
        *(draw.like(out[0]), *args[:5], out[1]),
    ),
    _ATTENTION: lambda draw, args, out: (draw.like(out[0]), *args, *out, False),
    "geglu": lambda draw, args, out: (draw.like(out), *args),
}


def candidates(operator: str, bucket: str, heuristic: Config) -> list[Config]:
    """Configurations around a heuristic, which is the first of them, the nearest before the others.

    Args:
        operator: whose.
        bucket: of the launch.
        heuristic: what its launcher takes by itself.
    """
    if operator == _ATTENTION:
        few = bucket.startswith("few_keys")  # all keys are one block
        axes = {
            "queries": _near(heuristic["queries"], 16, 128),
            "keys": [heuristic["keys"]] if few else _near(heuristic["keys"], 16, 128),
            "num_warps": _near(heuristic["num_warps"], 4, 8),
            "num_stages": [1, 2, 3],
        }
    elif operator == "geglu":
        axes = {"BLOCK_R": [1, 4, 8, 16], "BLOCK_C": [128, 256, 512], "num_warps": [4, 8]}
    else:
        axes = {
            "groups": sorted({1, heuristic["groups"], 2 * heuristic["groups"]}),
            "block_p": _near(heuristic["block_p"], 1, 8192),
            "num_warps": _near(heuristic["num_warps"], 1, 16),
        }
    combined = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    return sorted(
        [heuristic, *(config for config in combined if config != heuristic)],
        key=lambda config: sum(config[axis] != heuristic[axis] for axis in axes),
    )


def _near(value: int, least: int, most: int) -> list[int]:
    return sorted({min(max(v, least), most) for v in (value // 2, value, 2 * value)})
