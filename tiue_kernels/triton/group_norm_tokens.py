"""GroupNorm(x) of a map as tokens in Triton: the map is read as it lies, tokens are written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tiue_kernels.layout import like, memory_format
from tiue_kernels.triton.group_norm import (
    Plan,
    by_channel,
    group_terms,
    load_affine,
    load_statistics,
    memberships,
    merge_moments,
    new_maps,
    partials,
    reciprocal_deviation,
    store_statistics,
    tile_axes,
    tile_moments,
    tile_moments_of,
    tile_offsets,
    tuned_plan,
)
from tiue_kernels.triton.launch import on_device_of


# One program normalises one tile; a group that is larger than that brings its tiles' moments.
@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stats_ptr,
    partial_ptr,
    plane,
    rows,
    num_groups,
    pixels,
    splits,
    eps,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    unit = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    chunks = tl.cdiv(num_groups, GROUPS)
    row = unit // chunks
    offs_g, mask_g, offs_c, mask_c, offs_p, mask_p = tile_axes(
        unit % chunks, split, num_groups, pixels, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    mask = mask_c[:, None] & mask_p[None, :]
    channels = num_groups * GROUP_SIZE
    start = row.to(tl.int64) * channels * pixels
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
    count = 1.0 * pixels * GROUP_SIZE
    if WHOLE:
        mean, squares = tile_moments(x, mask, member, count)
    else:
        mean, squares = merge_moments(
            partial_ptr, plane, row * num_groups + offs_g, mask_g, splits, pixels, GROUP_SIZE,
            BLOCK_G, BLOCK_P,
        )  # fmt: skip
    rstd = reciprocal_deviation(squares, count, eps)
    if split == 0:
        store_statistics(stats_ptr, rows, row, num_groups, offs_g, mask_g, mean, rstd)
    weight, bias = load_affine(weight_ptr, bias_ptr, offs_c, mask_c)
    scale = by_channel(rstd, member) * weight
    out = (x - by_channel(mean, member)[:, None]) * scale[:, None] + bias[:, None]
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, True)
    tl.store(out_ptr + start + offsets, out, mask=mask)


@triton.jit
def _load_both(grad_ptr, x_ptr, stats_ptr, row, rows, num_groups, pixels, offs_c, mask_c, offs_p,
               mask_p, GROUP_SIZE: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """Gradient and normalised x, float32 tiles, 0 outside; rstd [BLOCK_C]."""
    mask = mask_c[:, None] & mask_p[None, :]
    channels = num_groups * GROUP_SIZE
    start = row.to(tl.int64) * channels * pixels
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, True)
    grad = tl.load(grad_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    mean, rstd = load_statistics(stats_ptr, rows, row, num_groups, offs_c, mask_c, GROUP_SIZE)
    normal = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    return grad, normal, rstd


# One program sums a tile's gradient, and its product with the normalised x, over the pixels: to
# sums [2, rows, channels, splits].
@triton.jit
def _sums_kernel(
    grad_ptr,
    x_ptr,
    stats_ptr,
    sums_ptr,
    plane,
    rows,
    num_groups,
    pixels,
    splits,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    unit = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    chunks = tl.cdiv(num_groups, GROUPS)
    row = unit // chunks
    _, _, offs_c, mask_c, offs_p, mask_p = tile_axes(
        unit % chunks, split, num_groups, pixels, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    grad, normal, _ = _load_both(
        grad_ptr, x_ptr, stats_ptr, row, rows, num_groups, pixels, offs_c, mask_c, offs_p, mask_p,
        GROUP_SIZE, CHANNELS_LAST,
    )  # fmt: skip
    place = (row.to(tl.int64) * num_groups * GROUP_SIZE + offs_c) * splits + split
    tl.store(sums_ptr + place, tl.sum(grad, axis=1), mask=mask_c)
    tl.store(sums_ptr + plane + place, tl.sum(grad * normal, axis=1), mask=mask_c)


# One program writes the gradient of one tile of x.
@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    stats_ptr,
    sums_ptr,
    plane,
    weight_ptr,
    grad_x_ptr,
    rows,
    num_groups,
    pixels,
    splits,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    unit = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    chunks = tl.cdiv(num_groups, GROUPS)
    row = unit // chunks
    _, _, offs_c, mask_c, offs_p, mask_p = tile_axes(
        unit % chunks, split, num_groups, pixels, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    grad, normal, rstd = _load_both(
        grad_ptr, x_ptr, stats_ptr, row, rows, num_groups, pixels, offs_c, mask_c, offs_p, mask_p,
        GROUP_SIZE, CHANNELS_LAST,
    )  # fmt: skip
    channels = num_groups * GROUP_SIZE
    place = row.to(tl.int64) * channels + offs_c
    grad_sum = tl.load(sums_ptr + place, mask=mask_c, other=0.0)
    product_sum = tl.load(sums_ptr + plane + place, mask=mask_c, other=0.0)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
    constant, factor = group_terms(grad_sum, product_sum, weight, member, 1.0 * pixels * GROUP_SIZE)
    grad_x = weight[:, None] * grad - constant[:, None] - factor[:, None] * normal
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    start = row.to(tl.int64) * channels * pixels
    mask = mask_c[:, None] & mask_p[None, :]
    tl.store(grad_x_ptr + start + offsets, rstd[:, None] * grad_x, mask=mask)


def group_norm_tokens_fwd(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, channels, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()
    out = torch.empty((rows, pixels, channels), dtype=x.dtype, device=x.device)
    stats = partials(x, 2, rows, num_groups)
    if not x.numel():
        return out, stats
    x = like(x, x)
    channels_last, tiles = _prepare(x, num_groups, held=1)
    with on_device_of(x):
        partial = None
        if not tiles.whole:
            partial = tile_moments_of(tiles, channels_last, num_groups, rows, x)
        _forward_kernel[(tiles.programs(rows, num_groups),)](
            *(x, weight.contiguous(), bias.contiguous(), out, stats),
            *(partial, 0 if partial is None else partial[0].numel()),
            *(rows, num_groups, pixels, tiles.splits, eps),
            GROUP_SIZE=channels // num_groups,
            CHANNELS_LAST=channels_last,
            WHOLE=tiles.whole,
            **tiles.constexprs(),
        )
    return out, stats


def group_norm_tokens_bwd(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, channels, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()
    x = like(x, x)
    channels_last, tiles = _prepare(x, num_groups, held=2)
    grad_x = new_maps(x, channels_last, *x.shape)
    if not x.numel():
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    inputs = (grad_out.contiguous(), x, stats.contiguous())
    sizes = (rows, num_groups, pixels, tiles.splits)
    options = {
        "GROUP_SIZE": channels // num_groups,
        "CHANNELS_LAST": channels_last,
        **tiles.constexprs(),
    }
    tile_sums = partials(x, 2, rows, channels, tiles.splits)
    grid = (tiles.programs(rows, num_groups),)
    with on_device_of(x):
        _sums_kernel[grid](*inputs, tile_sums, tile_sums[0].numel(), *sizes, **options)
        sums = tile_sums.sum(3)
        _backward_kernel[grid](
            *inputs, sums, sums[0].numel(), weight.contiguous(), grad_x, *sizes, **options
        )
    grad_bias, grad_weight = sums.sum(1)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _prepare(x: torch.Tensor, num_groups: int, held: int) -> tuple[bool, Plan]:
    """Whether a dense map lies in channels_last, and the tiles."""
    channels_last = memory_format(x) == torch.channels_last
    kernel = "forward" if held == 1 else "backward"
    sizes = (x.shape[0], num_groups, x.shape[1] // num_groups, x.shape[2:].numel())
    return channels_last, tuned_plan(
        "group_norm_tokens", kernel, x.device, *sizes, channels_last, held
    )
