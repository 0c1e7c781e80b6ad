"""sum_k E_k SiLU(GroupNorm(hidden_kb)) in Triton: the K timesteps become one row a sample."""

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
    silu,
    silu_slope,
    store_statistics,
    tile_moments,
    tile_moments_of,
    tile_offsets,
    tuned_plan,
)
from tiue_kernels.triton.launch import bound, on_device_of


# One program owns a tile of one sample and adds up its K normalised rows in float32 registers. The
# moments of a row come from the tile itself (WHOLE) or are merged from those of all tiles; the
# first tile of a group writes the statistics.
@triton.jit
def _forward_kernel(
    hidden_ptr,
    coefficients_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stats_ptr,
    partial_ptr,
    plane,
    rows,
    batch,
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
    sample, split, offs_g, mask_g, offs_c, mask_c, offs_p, mask = own_tile(
        num_groups, pixels, splits, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    channels = num_groups * GROUP_SIZE
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
    count = 1.0 * pixels * GROUP_SIZE
    weight, bias = load_affine(weight_ptr, bias_ptr, offs_c, mask_c)
    total = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
    for k in range(bound(rows // batch)):
        row = k * batch + sample
        start = hidden_ptr + row.to(tl.int64) * channels * pixels
        x = tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
        if WHOLE:
            mean, squares = tile_moments(x, mask, member, count)
        else:
            mean, squares = merge_moments(
                partial_ptr, plane, row * num_groups + offs_g, mask_g, splits, pixels,
                GROUP_SIZE, BLOCK_G, BLOCK_P,
            )  # fmt: skip
        rstd = reciprocal_deviation(squares, count, eps)
        if split == 0:
            store_statistics(stats_ptr, rows, row, num_groups, offs_g, mask_g, mean, rstd)
        centred = x - by_channel(mean, member)[:, None]
        z = centred * (by_channel(rstd, member) * weight)[:, None] + bias[:, None]
        total += tl.load(coefficients_ptr + k).to(tl.float32) * silu(z)
    start = out_ptr + sample.to(tl.int64) * channels * pixels
    tl.store(start + offsets, total, mask=mask)


# One program works on one tile of one row. FIRST pass: sums over the tile's pixels of the gradient
# at the norm's output, of its product with the normalised x, and of grad_out * SiLU (without E_k),
# float32, to sums [3, rows, channels, splits]. Second pass: the gradient at hidden, from the sums
# [3, rows, channels]. WHOLE does both at once and writes the sums with one split.
@triton.jit
def _backward_kernel(
    grad_ptr,
    hidden_ptr,
    coefficients_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    sums_ptr,
    grad_hidden_ptr,
    plane,
    rows,
    batch,
    num_groups,
    pixels,
    splits,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    FIRST: tl.constexpr,
):
    row, split, _, _, offs_c, mask_c, offs_p, mask = own_tile(
        num_groups, pixels, splits, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    channels = num_groups * GROUP_SIZE
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    weight, bias = load_affine(weight_ptr, bias_ptr, offs_c, mask_c)
    mean, rstd = load_statistics(stats_ptr, rows, row, num_groups, offs_c, mask_c, GROUP_SIZE)
    hidden_start = row.to(tl.int64) * channels * pixels
    grad_start = (row % batch).to(tl.int64) * channels * pixels
    x = tl.load(hidden_ptr + hidden_start + offsets, mask=mask, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_ptr + grad_start + offsets, mask=mask, other=0.0).to(tl.float32)
    normal = (x - mean[:, None]) * rstd[:, None]
    z = normal * weight[:, None] + bias[:, None]
    coefficient = tl.load(coefficients_ptr + row // batch).to(tl.float32)
    grad = coefficient * grad_out * silu_slope(z)

    place = row.to(tl.int64) * channels + offs_c
    if WHOLE or FIRST:
        grad_sum = tl.sum(grad, axis=1)
        product_sum = tl.sum(grad * normal, axis=1)
        sums = sums_ptr + place * splits + split
        tl.store(sums, grad_sum, mask=mask_c)
        tl.store(sums + plane, product_sum, mask=mask_c)
        tl.store(sums + plane + plane, tl.sum(grad_out * silu(z), axis=1), mask=mask_c)
    else:
        grad_sum = tl.load(sums_ptr + place, mask=mask_c, other=0.0)
        product_sum = tl.load(sums_ptr + plane + place, mask=mask_c, other=0.0)
    if WHOLE or not FIRST:
        member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
        count = 1.0 * pixels * GROUP_SIZE
        constant, factor = group_terms(grad_sum, product_sum, weight, member, count)
        slope = weight[:, None] * grad - constant[:, None] - factor[:, None] * normal
        tl.store(grad_hidden_ptr + hidden_start + offsets, slope * rstd[:, None], mask=mask)


def timestep_sum_group_norm_silu_fwd(
    hidden: torch.Tensor,
    coefficients: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = like(hidden, hidden)
    rows, batch = len(hidden), len(hidden) // len(coefficients)
    shape = (rows, num_groups, hidden.shape[1] // num_groups)
    channels_last, tiles = tuned_plan(
        "timestep_sum_group_norm_silu", "forward", hidden, *shape, held=2
    )
    out = new_maps(hidden, channels_last, batch, *hidden.shape[1:])
    stats = partials(hidden, 2, rows, num_groups)
    if not out.numel():
        return out, stats
    with on_device_of(hidden):
        partial = None
        if not tiles.whole:
            partial = tile_moments_of(tiles, channels_last, num_groups, rows, hidden)
        _forward_kernel[(tiles.programs(batch, num_groups),)](
            hidden,
            coefficients.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            out,
            stats,
            partial,
            rows * num_groups * tiles.splits,
            rows,
            batch,
            num_groups,
            hidden.shape[2:].numel(),
            tiles.splits,
            eps,
            GROUP_SIZE=hidden.shape[1] // num_groups,
            CHANNELS_LAST=channels_last,
            WHOLE=tiles.whole,
            **tiles.constexprs(),
        )
    return out, stats


def timestep_sum_group_norm_silu_bwd(
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    coefficients: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = like(hidden, hidden)
    rows, channels = hidden.shape[:2]
    shape = (rows, num_groups, channels // num_groups)
    channels_last, tiles = tuned_plan(
        "timestep_sum_group_norm_silu", "backward", hidden, *shape, held=2
    )
    timesteps = len(coefficients)
    grad_hidden = new_maps(hidden, channels_last, *hidden.shape)
    tile_sums = sums = partials(hidden, 3, rows, channels, tiles.splits)
    if hidden.numel():
        inputs = (
            like(grad_out, hidden),
            hidden,
            coefficients.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            stats.contiguous(),
        )
        sizes = (rows, rows // timesteps, num_groups, hidden.shape[2:].numel(), tiles.splits)
        options = {
            "GROUP_SIZE": channels // num_groups,
            "CHANNELS_LAST": channels_last,
            "WHOLE": tiles.whole,
            **tiles.constexprs(),
        }
        grid = (tiles.programs(rows, num_groups),)
        with on_device_of(hidden):
            _backward_kernel[grid](
                *inputs, tile_sums, grad_hidden, tile_sums[0].numel(), *sizes, FIRST=True, **options
            )
            if not tiles.whole:
                sums = tile_sums.sum(3)
                _backward_kernel[grid](
                    *inputs, sums, grad_hidden, rows * channels, *sizes, FIRST=False, **options
                )
    sums = sums.view(3, rows, channels)
    grad_bias, grad_weight = sums[:2].sum(1)
    grad_coefficients = sums[2].unflatten(0, (timesteps, -1)).sum((1, 2))
    return (
        grad_hidden,
        grad_coefficients.to(coefficients.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )
