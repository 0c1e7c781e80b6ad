"""Whole passes of tiny UNets on the absent GPU, forward and backward, in both layouts."""

from __future__ import annotations

import itertools
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from tests.absent_gpu.rules import absent_gpu, like_on_gpu, to_gpu
from tests.tiue.tiny import tiny_scheduler
from tests.tiue.unets import make_conditioning, make_inputs, make_unet
from tiue import OnePassSchedule, TiUEUNet
from tiue_kernels import use_backend
from tiue_kernels.functional import cross_timestep_attention

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


class Pass(NamedTuple):
    """One pass: inference by `one_pass`, or `predict_noise` and its gradients.

    Attributes:
        backends: that are forced; none: those that the dispatch table chooses.
    """

    unet: str
    dtype: str
    layout: str
    trains: bool
    backends: tuple[str, ...] = ("triton", "reference")

    @property
    def name(self) -> str:
        kind = "train" if self.trains else "one_pass"
        backend = self.backends[0] if self.backends else "table"
        return "-".join((self.unet, self.dtype, self.layout, kind, backend))


def passes() -> Iterator[Pass]:
    for trains, layout in itertools.product((False, True), LAYOUTS):
        yield Pass("sd1", "f16", layout, trains)
        yield Pass("sd1", "f16", layout, trains, ())
    yield Pass("sd2", "bf16", "nchw", False, ("reference",))
    yield Pass("sd2", "bf16", "nhwc", True, ("reference",))
    yield Pass("sdxl", "bf16", "nhwc", False)
    yield Pass("scale_shift", "f32", "nhwc", False)


def run(chosen: Pass) -> dict[str, object]:
    """What was checked; raises what a GPU would."""
    schedule = OnePassSchedule.from_scheduler(tiny_scheduler(), 4)
    dtype = DTYPES[chosen.dtype]
    unet = make_unet(chosen.unet).to(dtype).to(memory_format=LAYOUTS[chosen.layout])
    inputs = {name: x.to(dtype) for name, x in make_inputs((16, 16)).items()}
    given = torch.utils._pytree.tree_map_only(
        torch.Tensor,
        lambda x: x.to(dtype) if x.is_floating_point() else x,
        make_conditioning(chosen.unet),
    )
    with absent_gpu() as rules, ExitStack() as stack:
        if chosen.backends:
            stack.enter_context(use_backend(*chosen.backends))
        student = TiUEUNet.from_unet(to_gpu(unet))
        latents, text = (like_on_gpu(x) for x in inputs.values())
        given = torch.utils._pytree.tree_map_only(torch.Tensor, like_on_gpu, given)
        if chosen.trains:
            noise = student.train().predict_noise(latents, schedule.timesteps, text, **given)
            noise.square().sum().backward()
            missing = [name for name, p in student.named_parameters() if p.grad is None]
            assert not missing, missing
        else:
            with torch.no_grad():
                out = student.one_pass(latents, schedule, text, **given)
            assert (out.device.type, out.dtype) == ("cuda", dtype)
    return {
        "checked": rules.checked,
        "operators": rules.operators,
        "launches": rules.launches,
    }


def _native_group_norm(x: torch.Tensor) -> object:
    return torch.native_group_norm(x, None, None, *x.shape[:2], x.shape[2:].numel(), 2, 1e-5)


def _group_norm_backward(x: torch.Tensor) -> object:
    stats = x.new_empty(len(x), 2)
    sizes = (*x.shape[:2], x.shape[2:].numel(), 2, [True, False, False])
    return torch.ops.aten.native_group_norm_backward(x, x, stats, stats, None, *sizes)


def _triton_kernel(x: torch.Tensor) -> object:
    from tiue_kernels.triton.geglu import _forward_kernel

    return _forward_kernel[(1,)](x, torch.empty(4, device="cpu"), 1, 4, 1, 4)


def _flash_attention(x: torch.Tensor, size: int) -> object:
    heads = x.new_empty(1, 2, 8, size)
    return torch.ops.aten._scaled_dot_product_flash_attention(heads, heads, heads)


def _flash_gradients(x: torch.Tensor, size: int) -> object:
    heads, none = x.new_empty(1, 2, 8, size), x.new_empty(0, dtype=torch.int64)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 6)):
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(heads, heads, heads, heads, heads, x.new_empty(1, 2, 8, dtype=torch.float32)),
            *(None, None, 8, 8, 0.0, False, none, none),
        )


def attention(size: int, capability: tuple[int, int]) -> str | None:
    """What attention of heads of a size raises, where no backend is forced."""
    with absent_gpu(capability):
        x = torch.empty(2, 9, 2 * size, dtype=torch.float16, device="cuda", requires_grad=True)
        try:
            cross_timestep_attention(x, x, x, 2).sum().backward()
        except Exception as error:  # whatever it is, the test reads it
            return f"{type(error).__name__}: {error}"
    return None


# What runs on a CPU and fails, or is wrong, on a GPU: every one of them must raise.
PLANTED: dict[str, Callable[[torch.Tensor], object]] = {
    "group norm of channels_last maps": _native_group_norm,
    "its gradients": _group_norm_backward,
    "parameters of a norm in float32": lambda x: F.group_norm(
        x.contiguous(), 2, torch.ones(4, device="cuda")
    ),
    "layer norm likewise": lambda x: F.layer_norm(x, x.shape[-1:], torch.ones(8, device="cuda")),
    "tensors of two devices": lambda x: x + torch.ones(8, device="cpu"),
    "a weight that stayed on the CPU": lambda x: F.linear(
        x, torch.ones(8, 8, dtype=x.dtype, device="cpu")
    ),
    "the host waits for a value": lambda x: x.sum().item(),
    "a kernel reads the CPU's memory": _triton_kernel,
    "flash attention of heads of 4": lambda x: _flash_attention(x, 4),
    "its gradients of heads of 200, on compute capability 8.6": lambda x: _flash_gradients(x, 200),
}
# The other way round: every one of them must run, forward and backward.
ATTENTION = [
    (size, capability)
    for size in (4, 8, 36, 192, 200, 224, 256, 264)
    for capability in ((9, 0), (8, 6), (12, 0))
]


def main(words: list[str]) -> None:
    """Runs what is planted, then the passes; only those whose name holds every word."""
    for name, call in PLANTED.items():
        if all(word in name for word in words):
            print(json.dumps({"planted": name, "error": planted(call)}), flush=True)
    for call in ATTENTION:
        if all(word in "attention" for word in words):
            print(json.dumps({"attention": call, "error": attention(*call)}), flush=True)
    for chosen in passes():
        if all(word in chosen.name for word in words):
            try:
                found = run(chosen)
            except Exception as error:  # said by the test, beside the others
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps({"pass": chosen.name, **found}), flush=True)


def planted(call: Callable[[torch.Tensor], object]) -> str | None:
    """What a call with a channels_last map of float16 raises."""
    with absent_gpu(), torch.no_grad():
        x = torch.empty(2, 4, 8, 8, dtype=torch.float16, device="cuda")
        try:
            call(x.to(memory_format=torch.channels_last))
        except Exception as error:  # whatever it is, the test reads it
            return f"{type(error).__name__}: {error}"
    return None
