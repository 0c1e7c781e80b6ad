"""Attention kernels at Stable Diffusion's shapes, to be compiled for absent GPUs."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from tiue_kernels.triton.compilation import Compilation, launches_of
from tiue_kernels.triton.cross_timestep_attention import (
    cross_timestep_attention_bwd,
    cross_timestep_attention_fwd,
)


class Call(NamedTuple):
    """Attention of K = 4 timesteps over 77 keys of text, or of every row over itself."""

    heads: int
    head_dim: int
    tokens: int
    dtype: torch.dtype
    to_text: bool = True
    has_bias: bool = False
    needs_bias_grad: bool = False
    batch: int = 1


HALF, SINGLE = torch.float16, torch.float32
CALLS = {
    "40-f16-text": Call(8, 40, 4096, HALF),
    "40-f16-self": Call(8, 40, 4096, HALF, to_text=False),
    "64-f16-text": Call(10, 64, 4096, HALF, batch=2),
    "64-f16-self": Call(10, 64, 4096, HALF, to_text=False),
    "80-f16-text": Call(8, 80, 1024, HALF),
    "80-f16-text-mask": Call(8, 80, 1024, HALF, has_bias=True),
    "80-f16-text-bias": Call(8, 80, 1024, HALF, has_bias=True, needs_bias_grad=True),
    "80-f16-self": Call(8, 80, 1024, HALF, to_text=False),
    "80-bf16-text": Call(8, 80, 1024, torch.bfloat16, batch=2),
    "160-f16-text": Call(8, 160, 256, HALF),
    "160-f16-self": Call(8, 160, 256, HALF, to_text=False),
    "40-f32-text": Call(8, 40, 4096, SINGLE),
    "64-f32-text": Call(10, 64, 4096, SINGLE, batch=2),
    "64-f32-self": Call(10, 64, 4096, SINGLE, to_text=False),
    "80-f32-text-bias": Call(8, 80, 1024, SINGLE, has_bias=True, needs_bias_grad=True),
    "160-f32-text": Call(8, 160, 256, SINGLE),
}


def compilations() -> dict[str, Compilation]:
    """Every distinct compilation of the calls, named by the call and the kernel."""
    found: dict[str, Compilation] = {}
    for name, call in CALLS.items():
        for launch in launches_of(partial(run_launchers, call)):
            if launch not in found.values():
                found[f"{name}-{launch.kernel.__name__.removesuffix('_kernel')}"] = launch
    return found


def run_launchers(call: Call) -> None:
    """Forward and backward of a call, on meta tensors."""
    rows, channels = 4 * call.batch, call.heads * call.head_dim

    def maps(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=call.dtype, device="meta")

    query = maps(rows, call.tokens, channels)
    key = maps(call.batch, 77, channels) if call.to_text else maps(*query.shape)
    bias = maps(key.shape[0], 1, key.shape[1]) if call.has_bias else None
    operands = (query, key, maps(*key.shape), call.heads, call.head_dim**-0.5, bias)
    out, logsumexp = cross_timestep_attention_fwd(*operands)
    grad = maps(*query.shape)
    cross_timestep_attention_bwd(grad, *operands, out, logsumexp, call.needs_bias_grad)
