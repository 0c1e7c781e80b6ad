"""x1 * gelu(x2) of the two halves of the last axis in Triton, exact erf."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tiue_kernels import configs
from tiue_kernels.triton.launch import on_device_of, power_of_two

# 1280, 2560 and 5120 channels are multiples of 256.
TILE = {"BLOCK_R": 8, "BLOCK_C": 256, "num_warps": 4}

INVERSE_SQRT_2 = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _tile(n_rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows as int64, channels and mask of a program's tile."""
    blocks = tl.cdiv(channels, BLOCK_C)
    offs_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_r < n_rows)[:, None] & (offs_c < channels)[None, :]
    return offs_r[:, None], offs_c[None, :], mask


@triton.jit
def _normal_distribution(x):
    return 0.5 + 0.5 * tl.erf(x * INVERSE_SQRT_2)


# One program computes a tile of rows by channels in float32, one pass.
@triton.jit
def _forward_kernel(x_ptr, out_ptr, n_rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_r, offs_c, mask = _tile(n_rows, channels, BLOCK_R, BLOCK_C)
    x = x_ptr + offs_r * (2 * channels) + offs_c
    hidden = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x + channels, mask=mask, other=0.0).to(tl.float32)
    out = hidden * gate * _normal_distribution(gate)
    tl.store(out_ptr + offs_r * channels + offs_c, out, mask=mask)


# One program computes both halves of the gradient of a tile of rows by channels in float32.
@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, grad_x_ptr, n_rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    offs_r, offs_c, mask = _tile(n_rows, channels, BLOCK_R, BLOCK_C)
    offsets = offs_r * (2 * channels) + offs_c
    hidden = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + offsets + channels, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs_r * channels + offs_c, mask=mask, other=0.0).to(tl.float32)
    below = _normal_distribution(gate)
    density = INVERSE_SQRT_2_PI * tl.exp(-0.5 * gate * gate)
    tl.store(grad_x_ptr + offsets, grad * gate * below, mask=mask)
    tl.store(grad_x_ptr + offsets + channels, grad * hidden * (below + gate * density), mask=mask)


def geglu_fwd(x: torch.Tensor) -> torch.Tensor:
    channels = x.shape[-1] // 2
    out = torch.empty((*x.shape[:-1], channels), dtype=x.dtype, device=x.device)
    if out.numel():
        n_rows = out.numel() // channels
        with on_device_of(x):
            grid, tile = _launch("forward", x, n_rows, channels)
            _forward_kernel[grid](x.contiguous(), out, n_rows, channels, **tile)
    return out


def geglu_bwd(grad_out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    channels = x.shape[-1] // 2
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad_x.numel():
        n_rows = grad_out.numel() // channels
        with on_device_of(x):
            grid, tile = _launch("backward", x, n_rows, channels)
            _backward_kernel[grid](
                grad_out.contiguous(), x.contiguous(), grad_x, n_rows, channels, **tile
            )
    return grad_x


def _launch(
    kernel: str, x: torch.Tensor, n_rows: int, channels: int
) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the tile of one kernel."""
    dtype = str(x.dtype).removeprefix("torch.")
    bucket = f"{kernel}-{dtype}-rows{power_of_two(n_rows)}-channels{channels}"
    tile = configs.choose("geglu", bucket, TILE, x.device)
    rows, columns = tile["BLOCK_R"], tile["BLOCK_C"]
    return (triton.cdiv(n_rows, rows) * triton.cdiv(channels, columns),), tile
