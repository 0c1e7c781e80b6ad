"""GroupNorm(x) of a map as tokens in Triton: the map is read as it lies, tokens are written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tiue_kernels.layout import like
from tiue_kernels.triton.group_norm import (
    by_channel,
    group_terms,
    load_affine,
    load_statistics,
    memberships,
    merge_moments,
    new_maps,
    own_tile,
    partials,
    reciprocal_deviation,
    store_statistics,
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
    row, split, offs_g, mask_g, offs_c, mask_c, offs_p, mask = own_tile(
        num_groups, pixels, splits, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
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


# One program works on one tile. FIRST pass: it sums the gradient, and its product with the
# normalised x, over the tile's pixels, float32, to sums [2, rows, channels, splits]. Second pass:
# it writes the gradient at x, from the sums [2, rows, channels].
@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    stats_ptr,
    sums_ptr,
    grad_x_ptr,
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
    FIRST: tl.constexpr,
):
    row, split, _, _, offs_c, mask_c, offs_p, mask = own_tile(
        num_groups, pixels, splits, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    channels = num_groups * GROUP_SIZE
    start = row.to(tl.int64) * channels * pixels
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0).to(tl.float32)
    token_offsets = tile_offsets(offs_c, offs_p, channels, pixels, True)
    grad = tl.load(grad_ptr + start + token_offsets, mask=mask, other=0.0).to(tl.float32)
    mean, rstd = load_statistics(stats_ptr, rows, row, num_groups, offs_c, mask_c, GROUP_SIZE)
    normal = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    place = row.to(tl.int64) * channels + offs_c
    if FIRST:
        sums = sums_ptr + place * splits + split
        tl.store(sums, tl.sum(grad, axis=1), mask=mask_c)
        tl.store(sums + plane, tl.sum(grad * normal, axis=1), mask=mask_c)
    else:
        grad_sum = tl.load(sums_ptr + place, mask=mask_c, other=0.0)
        product_sum = tl.load(sums_ptr + plane + place, mask=mask_c, other=0.0)
        weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
        count = 1.0 * pixels * GROUP_SIZE
        constant, factor = group_terms(grad_sum, product_sum, weight, member, count)
        slope = weight[:, None] * grad - constant[:, None] - factor[:, None] * normal
        tl.store(grad_x_ptr + start + offsets, slope * rstd[:, None], mask=mask)


def group_norm_tokens_fwd(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, channels, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()
    out = torch.empty((rows, pixels, channels), dtype=x.dtype, device=x.device)
    stats = partials(x, 2, rows, num_groups)
    if not x.numel():
        return out, stats
    x = like(x, x)
    shape = (rows, num_groups, channels // num_groups)
    channels_last, tiles = tuned_plan("group_norm_tokens", "forward", x, *shape, held=1)
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
    shape = (rows, num_groups, channels // num_groups)
    channels_last, tiles = tuned_plan("group_norm_tokens", "backward", x, *shape, held=2)
    grad_x = new_maps(x, channels_last, *x.shape)
    if not x.numel():
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    inputs = (grad_out.contiguous(), x, weight.contiguous(), stats.contiguous())
    sizes = (rows, num_groups, pixels, tiles.splits)
    options = {
        "GROUP_SIZE": channels // num_groups,
        "CHANNELS_LAST": channels_last,
        **tiles.constexprs(),
    }
    tile_sums = partials(x, 2, rows, channels, tiles.splits)
    grid = (tiles.programs(rows, num_groups),)
    with on_device_of(x):
        _backward_kernel[grid](
            *inputs, tile_sums, grad_x, tile_sums[0].numel(), *sizes, FIRST=True, **options
        )
        sums = tile_sums.sum(3)
        _backward_kernel[grid](
            *inputs, sums, grad_x, sums[0].numel(), *sizes, FIRST=False, **options
        )
    grad_bias, grad_weight = sums.sum(1)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
