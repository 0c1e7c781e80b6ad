"""SiLU(GroupNorm(hidden_kb + shared_b + time_embedding_kb)) in Triton, plain and scale-shift."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tiue_kernels.layout import like
from tiue_kernels.triton.group_norm import (
    Plan,
    by_channel,
    group_terms,
    load_affine,
    load_statistics,
    load_sum,
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


# One program normalises one tile of one row: it takes the moments from the tile itself (WHOLE) or
# merges those of all tiles of its groups, and the first tile of a group writes the statistics.
# The sum is never rounded to the dtype of the maps.
@triton.jit
def _forward_kernel(
    hidden_ptr,
    shared_ptr,
    embedding_ptr,
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
    HAS_HIDDEN: tl.constexpr,
    SCALE_SHIFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row, split, offs_g, mask_g, offs_c, mask_c, offs_p, mask = own_tile(
        num_groups, pixels, splits, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    channels = num_groups * GROUP_SIZE
    member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
    count = 1.0 * pixels * GROUP_SIZE
    x = load_sum(
        hidden_ptr, shared_ptr, embedding_ptr, row, batch, offs_c, mask_c, offs_p, mask,
        channels, pixels, HAS_HIDDEN, True, not SCALE_SHIFT, CHANNELS_LAST,
    )  # fmt: skip
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

    weight, bias = _row_affine(
        weight_ptr, bias_ptr, embedding_ptr, row, offs_c, mask_c, channels, SCALE_SHIFT
    )
    centred = x - by_channel(mean, member)[:, None]
    z = centred * (by_channel(rstd, member) * weight)[:, None] + bias[:, None]
    start = out_ptr + row.to(tl.int64) * channels * pixels
    tl.store(
        start + tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST), silu(z), mask=mask
    )


@triton.jit
def _row_affine(
    weight_ptr, bias_ptr, embedding_ptr, row, offs_c, mask_c, channels, SCALE_SHIFT: tl.constexpr
):
    """Weight and bias of the norm with the row's scale and shift folded in."""
    weight, bias = load_affine(weight_ptr, bias_ptr, offs_c, mask_c)
    if SCALE_SHIFT:
        place = embedding_ptr + row.to(tl.int64) * (2 * channels) + offs_c
        scale = 1.0 + tl.load(place, mask=mask_c, other=0.0).to(tl.float32)
        shift = tl.load(place + channels, mask=mask_c, other=0.0).to(tl.float32)
        weight, bias = weight * scale, bias * scale + shift
    return weight, bias


@triton.jit
def _normal_and_grad(
    grad_ptr, hidden_ptr, shared_ptr, embedding_ptr, stats_ptr, weight, bias, rows, row, batch,
    num_groups, pixels, offs_c, mask_c, offs_p, mask, GROUP_SIZE: tl.constexpr,
    HAS_HIDDEN: tl.constexpr, SCALE_SHIFT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Tiles of a row, x normalised and the gradient at what SiLU reads, and the row's rstd."""
    channels = num_groups * GROUP_SIZE
    x = load_sum(
        hidden_ptr, shared_ptr, embedding_ptr, row, batch, offs_c, mask_c, offs_p, mask,
        channels, pixels, HAS_HIDDEN, True, not SCALE_SHIFT, CHANNELS_LAST,
    )  # fmt: skip
    mean, rstd = load_statistics(stats_ptr, rows, row, num_groups, offs_c, mask_c, GROUP_SIZE)
    normal = (x - mean[:, None]) * rstd[:, None]
    start = grad_ptr + row.to(tl.int64) * channels * pixels
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    grad = tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = grad * silu_slope(normal * weight[:, None] + bias[:, None])
    return tl.where(mask, normal, 0.0), grad, rstd


# One program sums one tile of one row over its pixels: gradient at the norm's output, its product
# with the normalised x, and the normalised x, float32, to sums [3, rows, channels, splits].
@triton.jit
def _sums_kernel(
    grad_ptr,
    hidden_ptr,
    shared_ptr,
    embedding_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    sums_ptr,
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
    HAS_HIDDEN: tl.constexpr,
    SCALE_SHIFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    row, split, _, _, offs_c, mask_c, offs_p, mask = own_tile(
        num_groups, pixels, splits, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    channels = num_groups * GROUP_SIZE
    weight, bias = _row_affine(
        weight_ptr, bias_ptr, embedding_ptr, row, offs_c, mask_c, channels, SCALE_SHIFT
    )
    normal, grad, _ = _normal_and_grad(
        grad_ptr, hidden_ptr, shared_ptr, embedding_ptr, stats_ptr, weight, bias, rows, row, batch,
        num_groups, pixels, offs_c, mask_c, offs_p, mask, GROUP_SIZE, HAS_HIDDEN, SCALE_SHIFT,
        CHANNELS_LAST,
    )  # fmt: skip
    place = sums_ptr + (row.to(tl.int64) * channels + offs_c) * splits + split
    tl.store(place, tl.sum(grad, axis=1), mask=mask_c)
    tl.store(place + plane, tl.sum(grad * normal, axis=1), mask=mask_c)
    tl.store(place + plane + plane, tl.sum(normal, axis=1), mask=mask_c)


# One program owns a tile of one sample and walks its K rows, so that the gradient of `shared` is
# summed in registers. The sums over pixels come from the tile (WHOLE) or from sums [3, rows,
# channels]; the first tile of a group writes the gradients that follow from them alone: those of
# the time embedding, and of weight and bias by row, float32 [2, rows, channels].
@triton.jit
def _backward_kernel(
    grad_ptr,
    hidden_ptr,
    shared_ptr,
    embedding_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    sums_ptr,
    grad_hidden_ptr,
    grad_shared_ptr,
    grad_embedding_ptr,
    grad_affine_ptr,
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
    HAS_HIDDEN: tl.constexpr,
    SCALE_SHIFT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr,
):
    sample, split, _, _, offs_c, mask_c, offs_p, mask = own_tile(
        num_groups, pixels, splits, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    channels = num_groups * GROUP_SIZE
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
    count = 1.0 * pixels * GROUP_SIZE
    grad_shared = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
    for k in range(bound(rows // batch)):
        row = k * batch + sample
        weight, bias = _row_affine(
            weight_ptr, bias_ptr, embedding_ptr, row, offs_c, mask_c, channels, SCALE_SHIFT
        )
        normal, grad, rstd = _normal_and_grad(
            grad_ptr, hidden_ptr, shared_ptr, embedding_ptr, stats_ptr, weight, bias, rows, row,
            batch, num_groups, pixels, offs_c, mask_c, offs_p, mask, GROUP_SIZE, HAS_HIDDEN,
            SCALE_SHIFT, CHANNELS_LAST,
        )  # fmt: skip
        place = row.to(tl.int64) * channels + offs_c
        if WHOLE:
            grad_sum = tl.sum(grad, axis=1)
            product_sum = tl.sum(grad * normal, axis=1)
            normal_sum = tl.sum(normal, axis=1)
        else:
            grad_sum = tl.load(sums_ptr + place, mask=mask_c, other=0.0)
            product_sum = tl.load(sums_ptr + plane + place, mask=mask_c, other=0.0)
            normal_sum = tl.load(sums_ptr + plane + plane + place, mask=mask_c, other=0.0)

        constant, factor = group_terms(grad_sum, product_sum, weight, member, count)
        slope = weight[:, None] * grad - constant[:, None] - factor[:, None] * normal
        slope *= rstd[:, None]
        grad_shared += slope
        if HAS_HIDDEN:
            start = grad_hidden_ptr + row.to(tl.int64) * channels * pixels
            tl.store(start + offsets, slope, mask=mask)
        if split == 0:
            if SCALE_SHIFT:
                own_weight, own_bias = load_affine(weight_ptr, bias_ptr, offs_c, mask_c)
                place_scale = row.to(tl.int64) * (2 * channels) + offs_c
                grad_scale = own_weight * product_sum + own_bias * grad_sum
                tl.store(grad_embedding_ptr + place_scale, grad_scale, mask=mask_c)
                tl.store(grad_embedding_ptr + place_scale + channels, grad_sum, mask=mask_c)
                scale = tl.load(embedding_ptr + place_scale, mask=mask_c, other=0.0)
                grad_sum *= 1.0 + scale.to(tl.float32)
                product_sum *= 1.0 + scale.to(tl.float32)
            else:
                # The slope summed over pixels, from the sums of its terms.
                total = weight * grad_sum - constant * pixels - factor * normal_sum
                tl.store(grad_embedding_ptr + place, total * rstd, mask=mask_c)
            tl.store(grad_affine_ptr + place, product_sum, mask=mask_c)
            tl.store(grad_affine_ptr + plane + place, grad_sum, mask=mask_c)
    start = grad_shared_ptr + sample.to(tl.int64) * channels * pixels
    tl.store(start + offsets, grad_shared, mask=mask)


def broadcast_add_group_norm_silu_fwd(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(time_embedding)
    hidden, shared, channels_last, tiles = _prepare(hidden, shared, rows, num_groups, held=1)
    embedding = time_embedding.contiguous()
    out = new_maps(shared, channels_last, rows, *shared.shape[1:])
    stats = partials(shared, 2, rows, num_groups)
    if not out.numel():
        return out, stats
    with on_device_of(shared):
        partial = None
        if not tiles.whole:
            added = None if scale_shift else embedding
            partial = tile_moments_of(tiles, channels_last, num_groups, rows, hidden, shared, added)
        _forward_kernel[(tiles.programs(rows, num_groups),)](
            hidden,
            shared,
            embedding,
            weight.contiguous(),
            bias.contiguous(),
            out,
            stats,
            partial,
            rows * num_groups * tiles.splits,
            rows,
            len(shared),
            num_groups,
            shared.shape[2:].numel(),
            tiles.splits,
            eps,
            GROUP_SIZE=shared.shape[1] // num_groups,
            HAS_HIDDEN=hidden is not None,
            SCALE_SHIFT=scale_shift,
            CHANNELS_LAST=channels_last,
            WHOLE=tiles.whole,
            **tiles.constexprs(),
        )
    return out, stats


def broadcast_add_group_norm_silu_bwd(
    grad_out: torch.Tensor,
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale_shift: bool,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = len(time_embedding)
    hidden, shared, channels_last, tiles = _prepare(hidden, shared, rows, num_groups, held=2)
    channels, pixels = shared.shape[1], shared.shape[2:].numel()
    grad_shared = new_maps(shared, channels_last, *shared.shape)
    grad_hidden = shared.new_empty(0)
    if hidden is not None:
        grad_hidden = new_maps(shared, channels_last, *hidden.shape)
    grad_embedding = torch.empty(
        time_embedding.shape, dtype=time_embedding.dtype, device=shared.device
    )
    grad_affine = partials(shared, 2, rows, channels)
    if grad_out.numel():
        inputs = (
            like(grad_out, shared),
            hidden,
            shared,
            time_embedding.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            stats.contiguous(),
        )
        sizes = (rows, len(shared), num_groups, pixels, tiles.splits)
        options = {
            "GROUP_SIZE": channels // num_groups,
            "HAS_HIDDEN": hidden is not None,
            "SCALE_SHIFT": scale_shift,
            "CHANNELS_LAST": channels_last,
            **tiles.constexprs(),
        }
        with on_device_of(shared):
            sums = None
            if not tiles.whole:
                tile_sums = partials(shared, 3, rows, channels, tiles.splits)
                _sums_kernel[(tiles.programs(rows, num_groups),)](
                    *inputs, tile_sums, tile_sums[0].numel(), *sizes, **options
                )
                sums = tile_sums.sum(3)
            _backward_kernel[(tiles.programs(len(shared), num_groups),)](
                *inputs,
                sums,
                grad_hidden,
                grad_shared,
                grad_embedding,
                grad_affine,
                rows * channels,
                *sizes,
                WHOLE=tiles.whole,
                **options,
            )
    grad_weight, grad_bias = grad_affine.sum(1)
    return (
        grad_hidden,
        grad_shared,
        grad_embedding,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    )


def _prepare(
    hidden: torch.Tensor | None, shared: torch.Tensor, rows: int, num_groups: int, held: int
) -> tuple[torch.Tensor | None, torch.Tensor, bool, Plan]:
    """Dense maps in the format of the rows, whether that is channels_last, and the tiles."""
    if hidden is None:
        wanted = shared = like(shared, shared)
    else:
        wanted = hidden = like(hidden, hidden)
        shared = like(shared, hidden)
    kernel, group_size = "forward" if held == 1 else "backward", shared.shape[1] // num_groups
    channels_last, tiles = tuned_plan(
        "broadcast_add_group_norm_silu", kernel, wanted, rows, num_groups, group_size, held
    )
    return hidden, shared, channels_last, tiles
