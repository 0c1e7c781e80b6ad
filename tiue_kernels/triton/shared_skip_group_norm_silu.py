"""SiLU(GroupNorm(concat(hidden, skip))) over K timesteps in Triton: no concat, no repeat.

The groups up to c0 have K*B rows, those wholly in the skip have B: one launch covers both sides,
first every tile of the hidden side, then every tile of the skip side.
"""

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
    partials,
    reciprocal_deviation,
    silu,
    silu_slope,
    store_moments,
    store_statistics,
    tile_axes,
    tile_moments,
    tile_offsets,
    tuned_plan,
)
from tiue_kernels.triton.launch import bound, on_device_of


@triton.jit
def _side(unit, rows, hidden_groups, skip_groups, GROUPS: tl.constexpr):
    """Which side a tile is on, its row and chunk of groups there, and how many groups there are."""
    hidden_chunks = tl.cdiv(hidden_groups, GROUPS)
    in_hidden = unit < rows * hidden_chunks
    inside = tl.where(in_hidden, unit, unit - rows * hidden_chunks)
    groups = tl.where(in_hidden, hidden_groups, skip_groups)
    chunks = tl.cdiv(groups, GROUPS)
    return in_hidden, inside // chunks, inside % chunks, groups


@triton.jit
def _load_tile(
    hidden_ptr, skip_ptr, in_hidden, row, batch, hidden_channels, skip_channels, pixels, offs_c,
    mask_c, offs_p, mask_p, straddling, STRADDLES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """float32 tile of one side, channels counted from the side's first, 0 outside."""
    channels = tl.where(in_hidden, hidden_channels, skip_channels)
    start = row.to(tl.int64) * channels * pixels
    x_ptr = hidden_ptr + start if in_hidden else skip_ptr + start
    first = tl.where(in_hidden, 0, straddling)
    mask = (mask_c & (offs_c + first < channels))[:, None] & mask_p[None, :]
    offsets = tile_offsets(offs_c + first, offs_p, channels, pixels, CHANNELS_LAST)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if STRADDLES:  # the border group's other channels, on the hidden side
        rest = (mask_c & in_hidden & (offs_c >= hidden_channels))[:, None] & mask_p[None, :]
        start = skip_ptr + (row % batch).to(tl.int64) * skip_channels * pixels
        offsets = tile_offsets(offs_c - hidden_channels, offs_p, skip_channels, pixels,
                               CHANNELS_LAST)  # fmt: skip
        x += tl.load(start + offsets, mask=rest, other=0.0).to(tl.float32)
    return x


# One program reads one tile of one row of one side. FIRST pass: it writes mean and centred squares
# of its part of each group, float32, to partial [2, groups of all rows, splits]. Second pass: it
# merges those of its groups, normalises and stores; the first tile of a group writes the
# statistics. WHOLE does both at once from registers.
@triton.jit
def _forward_kernel(
    hidden_ptr,
    skip_ptr,
    weight_ptr,
    bias_ptr,
    hidden_out_ptr,
    skip_out_ptr,
    hidden_stats_ptr,
    skip_stats_ptr,
    partial_ptr,
    plane,
    rows,
    batch,
    hidden_channels,
    skip_channels,
    hidden_groups,
    skip_groups,
    pixels,
    splits,
    eps,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STRADDLES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    FIRST: tl.constexpr,
):
    split = tl.program_id(0) % splits
    in_hidden, row, chunk, num_groups = _side(
        tl.program_id(0) // splits, rows, hidden_groups, skip_groups, GROUPS
    )
    border = hidden_groups * GROUP_SIZE
    offs_g, mask_g, offs_c, mask_c, offs_p, mask_p = tile_axes(
        chunk, split, num_groups, pixels, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    mask = mask_c[:, None] & mask_p[None, :]
    x = _load_tile(
        hidden_ptr, skip_ptr, in_hidden, row, batch, hidden_channels, skip_channels, pixels,
        offs_c, mask_c, offs_p, mask_p, border - hidden_channels, STRADDLES, CHANNELS_LAST,
    )  # fmt: skip
    member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
    rows_of_groups = row * num_groups + offs_g + tl.where(in_hidden, 0, rows * hidden_groups)
    if WHOLE or FIRST:
        tile_pixels = tl.minimum(pixels - split * BLOCK_P, BLOCK_P)
        mean, squares = tile_moments(x, mask, member, 1.0 * tile_pixels * GROUP_SIZE)
    else:
        mean, squares = merge_moments(
            partial_ptr, plane, rows_of_groups, mask_g, splits, pixels, GROUP_SIZE, BLOCK_G, BLOCK_P
        )
    if FIRST and not WHOLE:
        store_moments(partial_ptr, plane, mean, squares, rows_of_groups, mask_g, split, splits)
    else:
        rstd = reciprocal_deviation(squares, 1.0 * pixels * GROUP_SIZE, eps)
        if in_hidden:
            stats_ptr = hidden_stats_ptr
            out_ptr = hidden_out_ptr
        else:
            stats_ptr = skip_stats_ptr
            out_ptr = skip_out_ptr
        side_rows = tl.where(in_hidden, rows, batch)
        if split == 0:
            store_statistics(stats_ptr, side_rows, row, num_groups, offs_g, mask_g, mean, rstd)
        first = tl.where(in_hidden, 0, border)
        weight, bias = load_affine(weight_ptr + first, bias_ptr + first, offs_c, mask_c)
        centred = x - by_channel(mean, member)[:, None]
        z = centred * (by_channel(rstd, member) * weight)[:, None] + bias[:, None]
        channels = num_groups * GROUP_SIZE
        offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
        start = row.to(tl.int64) * channels * pixels
        tl.store(out_ptr + start + offsets, silu(z), mask=mask)


# One program works on one tile of one row of one side; where the border group straddles, its tile
# of a sample walks all K rows, to sum the skip channels' gradient in registers. FIRST pass: sums
# over the tile's pixels of the gradient at the norm's output and of its product with the normalised
# x, float32, to sums [2, channels of all rows, splits]. Second pass: the gradients at hidden and
# skip, from the sums [2, channels of all rows]. WHOLE does both at once, with one split.
@triton.jit
def _backward_kernel(
    grad_hidden_out_ptr,
    grad_skip_out_ptr,
    hidden_ptr,
    skip_ptr,
    weight_ptr,
    bias_ptr,
    hidden_stats_ptr,
    skip_stats_ptr,
    sums_ptr,
    grad_hidden_ptr,
    grad_skip_ptr,
    plane,
    rows,
    batch,
    hidden_channels,
    skip_channels,
    hidden_groups,
    skip_groups,
    pixels,
    splits,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STRADDLES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WHOLE: tl.constexpr,
    FIRST: tl.constexpr,
):
    split = tl.program_id(0) % splits
    in_hidden, own_row, chunk, num_groups = _side(
        tl.program_id(0) // splits, rows, hidden_groups, skip_groups, GROUPS
    )
    border = hidden_groups * GROUP_SIZE
    straddling = border - hidden_channels
    _, _, offs_c, mask_c, offs_p, mask_p = tile_axes(
        chunk, split, num_groups, pixels, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    mask = mask_c[:, None] & mask_p[None, :]
    channels = num_groups * GROUP_SIZE
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
    if in_hidden:
        grad_out_ptr = grad_hidden_out_ptr
        stats_ptr = hidden_stats_ptr
        grad_ptr = grad_hidden_ptr
    else:
        grad_out_ptr = grad_skip_out_ptr
        stats_ptr = skip_stats_ptr
        grad_ptr = grad_skip_ptr
    side_rows = tl.where(in_hidden, rows, batch)
    first = tl.where(in_hidden, 0, border)
    weight, bias = load_affine(weight_ptr + first, bias_ptr + first, offs_c, mask_c)

    walked = 1
    if STRADDLES and not (FIRST and not WHOLE):
        # The last chunk of the hidden side: the program of row k = 0 takes all K, the others none.
        shared = in_hidden & ((chunk + 1) * GROUPS >= num_groups)
        walked = tl.where(shared, tl.where(own_row < batch, rows // batch, 0), 1)
        shared_grad = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
    for k in range(bound(walked) if STRADDLES and not (FIRST and not WHOLE) else 1):
        row = own_row + k * batch
        x = _load_tile(
            hidden_ptr, skip_ptr, in_hidden, row, batch, hidden_channels, skip_channels, pixels,
            offs_c, mask_c, offs_p, mask_p, straddling, STRADDLES, CHANNELS_LAST,
        )  # fmt: skip
        mean, rstd = load_statistics(
            stats_ptr, side_rows, row, num_groups, offs_c, mask_c, GROUP_SIZE
        )
        normal = (x - mean[:, None]) * rstd[:, None]
        start = grad_out_ptr + row.to(tl.int64) * channels * pixels
        grad = tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
        grad *= silu_slope(normal * weight[:, None] + bias[:, None])

        place = row.to(tl.int64) * channels + offs_c
        place += tl.where(in_hidden, 0, rows * border)
        if WHOLE or FIRST:
            grad_sum = tl.sum(grad, axis=1)
            product_sum = tl.sum(grad * normal, axis=1)
            tl.store(sums_ptr + place * splits + split, grad_sum, mask=mask_c)
            tl.store(sums_ptr + plane + place * splits + split, product_sum, mask=mask_c)
        else:
            grad_sum = tl.load(sums_ptr + place, mask=mask_c, other=0.0)
            product_sum = tl.load(sums_ptr + plane + place, mask=mask_c, other=0.0)
        if WHOLE or not FIRST:
            constant, factor = group_terms(
                grad_sum, product_sum, weight, member, 1.0 * pixels * GROUP_SIZE
            )
            slope = weight[:, None] * grad - constant[:, None] - factor[:, None] * normal
            slope *= rstd[:, None]
            if STRADDLES:
                shared_grad += slope
            own_channels = tl.where(in_hidden, hidden_channels, skip_channels)
            own_c = offs_c + tl.where(in_hidden, 0, straddling)
            own = (mask_c & (own_c < own_channels))[:, None] & mask_p[None, :]
            start = grad_ptr + row.to(tl.int64) * own_channels * pixels
            own_offsets = tile_offsets(own_c, offs_p, own_channels, pixels, CHANNELS_LAST)
            tl.store(start + own_offsets, slope, mask=own)
    if STRADDLES and not (FIRST and not WHOLE):  # noqa: SIM102 (decided by the compiler)
        if shared & (own_row < batch):
            rest = (mask_c & (offs_c >= hidden_channels))[:, None] & mask_p[None, :]
            start = grad_skip_ptr + own_row.to(tl.int64) * skip_channels * pixels
            skip_offsets = tile_offsets(
                offs_c - hidden_channels, offs_p, skip_channels, pixels, CHANNELS_LAST
            )
            tl.store(start + skip_offsets, shared_grad, mask=rest)


def shared_skip_group_norm_silu_fwd(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = _Shape(hidden, skip, num_groups, held=1)
    rows, batch, size = len(hidden), len(skip), hidden.shape[2:]
    hidden_out = new_maps(hidden, shape.channels_last, rows, shape.border, *size)
    skip_out = new_maps(hidden, shape.channels_last, batch, len(weight) - shape.border, *size)
    hidden_stats = partials(hidden, 2, rows, shape.hidden_groups)
    skip_stats = partials(hidden, 2, batch, shape.skip_groups)
    if not hidden_out.numel():
        return hidden_out, skip_out, hidden_stats, skip_stats

    tiles = shape.tiles
    partial = None
    if not tiles.whole:
        partial = partials(
            hidden, 2, rows * shape.hidden_groups + batch * shape.skip_groups, tiles.splits
        )
    with on_device_of(hidden):
        for first in (True,) if tiles.whole else (True, False):
            _forward_kernel[shape.grid](
                like(hidden, hidden),
                like(skip, hidden),
                weight.contiguous(),
                bias.contiguous(),
                hidden_out,
                skip_out,
                hidden_stats,
                skip_stats,
                partial,
                0 if partial is None else partial[0].numel(),
                *shape.sizes,
                eps,
                FIRST=first,
                **shape.options,
            )
    return hidden_out, skip_out, hidden_stats, skip_stats


def shared_skip_group_norm_silu_bwd(
    grad_hidden_out: torch.Tensor,
    grad_skip_out: torch.Tensor,
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    hidden_stats: torch.Tensor,
    skip_stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = _Shape(hidden, skip, num_groups, held=2)
    tiles, border, rows = shape.tiles, shape.border, len(hidden)
    grad_hidden = new_maps(hidden, shape.channels_last, *hidden.shape)
    grad_skip = new_maps(hidden, shape.channels_last, *skip.shape)
    both = rows * border + len(skip) * (len(weight) - border)
    tile_sums = sums = partials(hidden, 2, both, tiles.splits)
    if both:
        inputs = (
            like(grad_hidden_out, hidden),
            like(grad_skip_out, hidden),
            like(hidden, hidden),
            like(skip, hidden),
            weight.contiguous(),
            bias.contiguous(),
            hidden_stats.contiguous(),
            skip_stats.contiguous(),
        )
        with on_device_of(hidden):
            for first in (True,) if tiles.whole else (True, False):
                if not first:
                    sums = tile_sums.sum(2)
                _backward_kernel[shape.grid](
                    *inputs,
                    sums,
                    grad_hidden,
                    grad_skip,
                    sums[0].numel(),
                    *shape.sizes,
                    FIRST=first,
                    **shape.options,
                )
    front, back = sums.view(2, both).split([rows * border, both - rows * border], dim=1)
    grads = [
        torch.cat([f, b])
        for f, b in zip(
            front.view(2, rows, border).sum(1),
            back.view(2, len(skip), len(weight) - border).sum(1),
            strict=True,
        )
    ]
    return grad_hidden, grad_skip, grads[1].to(weight.dtype), grads[0].to(bias.dtype)


class _Shape:
    """What both launchers derive from the shapes of a call."""

    def __init__(
        self, hidden: torch.Tensor, skip: torch.Tensor, num_groups: int, held: int
    ) -> None:
        rows, batch = len(hidden), len(skip)
        group_size = (hidden.shape[1] + skip.shape[1]) // num_groups
        self.hidden_groups = -(-hidden.shape[1] // group_size)
        self.skip_groups = num_groups - self.hidden_groups
        self.border = self.hidden_groups * group_size
        kernel = "forward" if held == 1 else "backward"
        self.channels_last, self.tiles = tuned_plan(
            "shared_skip_group_norm_silu", kernel, hidden, rows, num_groups, group_size, held
        )
        self.grid = (
            self.tiles.programs(rows, self.hidden_groups)
            + self.tiles.programs(batch, self.skip_groups),
        )
        self.sizes = (
            rows,
            batch,
            hidden.shape[1],
            skip.shape[1],
            self.hidden_groups,
            self.skip_groups,
            hidden.shape[2:].numel(),
            self.tiles.splits,
        )
        self.options = {
            "GROUP_SIZE": group_size,
            "STRADDLES": self.border != hidden.shape[1],
            "CHANNELS_LAST": self.channels_last,
            "WHOLE": self.tiles.whole,
            **self.tiles.constexprs(),
        }
