"""Tiles, statistics and derivatives that the group-norm kernels share.

A program owns a tile [BLOCK_C, BLOCK_P]: the channels of GROUPS whole groups, padded to a power of
two, by a block of pixels. The same tile is coalesced in both layouts, along pixels or along
channels. A group that fits one tile is read once (`WHOLE`). A larger one is read twice, the second
time mostly from L2: `moments_kernel` writes mean and centred squares of each tile, and the kernel
that applies the norm merges them. Everything is float32 and centred before it is squared.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tiue_kernels import configs
from tiue_kernels.layout import memory_format
from tiue_kernels.triton.launch import bound, power_of_two

# Elements of a tile that holds a group whole (32 a thread of 16 warps), and of one that does not
# (32 a thread of 8 warps).
WHOLE_TILE = 16384
SPLIT_TILE = 8192
# Programs for each multiprocessor: below them, narrow tiles; above them, well-filled ones.
ENOUGH_PROGRAMS = 2


class Plan(NamedTuple):
    """How groups and pixels are cut into tiles; every field but `splits` is a constexpr."""

    groups: int  # whole groups a tile
    block_g: int
    block_c: int
    block_p: int
    splits: int  # tiles a group
    num_warps: int

    @property
    def whole(self) -> bool:
        return self.splits == 1

    def programs(self, rows: int, num_groups: int) -> int:
        """Tiles of `rows` rows."""
        return rows * -(-num_groups // self.groups) * self.splits

    def constexprs(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "GROUPS": self.groups,
            "BLOCK_G": self.block_g,
            "BLOCK_C": self.block_c,
            "BLOCK_P": self.block_p,
            "num_warps": self.num_warps,
        }


def tuned_plan(
    operator: str,
    kernel: str,
    maps: torch.Tensor,
    rows: int,
    num_groups: int,
    group_size: int,
    held: int,
) -> tuple[bool, Plan]:
    """Whether dense maps lie in channels_last, and their tiles: those of `plan`, or tuned ones.

    `kernel` is "forward" or "backward"; the rest is what `plan` takes.
    """
    device, pixels = maps.device, maps.shape[2:].numel()
    channels_last = memory_format(maps) == torch.channels_last
    multiprocessors = configs.multiprocessors(device)
    own = plan(rows, num_groups, group_size, pixels, channels_last, held, multiprocessors)
    if not configs.has_choice(operator, device):
        return channels_last, own
    bucket = (
        f"{kernel}-{'nhwc' if channels_last else 'nchw'}-rows{power_of_two(rows)}"
        f"-groups{num_groups}x{group_size}-pixels{power_of_two(pixels)}"
    )
    heuristic = {"groups": own.groups, "block_p": own.block_p, "num_warps": own.num_warps}
    chosen = configs.choose(operator, bucket, heuristic, device)
    if chosen is heuristic:
        return channels_last, own
    groups, block_p = min(chosen["groups"], num_groups), chosen["block_p"]
    blocks = (power_of_two(groups), power_of_two(groups * group_size))
    splits = -(-pixels // block_p)
    return channels_last, Plan(groups, *blocks, block_p, splits, chosen["num_warps"])


def plan(
    rows: int,
    num_groups: int,
    group_size: int,
    pixels: int,
    channels_last: bool,
    held: int = 1,
    multiprocessors: int = configs.H100_MULTIPROCESSORS,
) -> Plan:
    """Tiles for `rows` rows of `num_groups` groups of `group_size` channels by `pixels`.

    `held` is 2 for kernels that hold a second tile over a loop, or a gradient beside x: 16 elements
    a thread, where 32 spill up to 1.2 KB on sm_90.
    """
    sizes = (rows, num_groups, group_size, pixels, channels_last, held, multiprocessors)
    return _plan(*sizes, WHOLE_TILE // held, SPLIT_TILE // held)


@functools.lru_cache(maxsize=1024)  # 24 us a call, of the 160 to 400 of an operator's launch
def _plan(
    rows: int,
    num_groups: int,
    group_size: int,
    pixels: int,
    channels_last: bool,
    held: int,
    multiprocessors: int,
    whole_tile: int,
    split_tile: int,
) -> Plan:
    options = []
    for groups in range(1, num_groups + 1):
        block_g, block_c = power_of_two(groups), power_of_two(groups * group_size)
        if groups > 1 and (block_g * block_c > 4096 or block_c > 256):
            break  # sums by group run over [block_g, block_c]
        # 16 bytes of a half type: else channels_last rows are loaded in smaller words.
        ragged = channels_last and groups * group_size % 8 != 0
        narrow = channels_last and groups * group_size < 32 and groups < num_groups
        chunks = -(-num_groups // groups)
        options.append((groups, block_g, block_c, chunks, ragged, narrow))

    def used(option: tuple[int, ...]) -> float:
        return num_groups * group_size / (option[3] * option[2])

    block_p = power_of_two(pixels)
    fitting = [o for o in options if o[2] * block_p <= whole_tile and not o[5]]
    if fitting:
        enough = ENOUGH_PROGRAMS * multiprocessors
        best = max(fitting, key=lambda o: (min(rows * o[3], enough), used(o)))
    else:
        best = max(options, key=lambda o: (not o[5], not o[4], used(o), -o[2]))
        block_p = min(block_p, max(split_tile // best[2], min(32, whole_tile // best[2]), 1))
    groups, block_g, block_c = best[:3]
    num_warps = min(max(block_c * block_p * held // 1024, 1), 16)
    return Plan(groups, block_g, block_c, block_p, -(-pixels // block_p), power_of_two(num_warps))


@triton.jit
def tile_axes(chunk, split, num_groups, pixels, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
              BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Groups, channels and pixels of a tile with their masks."""
    offs_g = chunk * GROUPS + tl.arange(0, BLOCK_G)
    mask_g = (tl.arange(0, BLOCK_G) < GROUPS) & (offs_g < num_groups)
    offs_c = chunk * (GROUPS * GROUP_SIZE) + tl.arange(0, BLOCK_C)
    mask_c = (tl.arange(0, BLOCK_C) < GROUPS * GROUP_SIZE) & (offs_c < num_groups * GROUP_SIZE)
    offs_p = split * BLOCK_P + tl.arange(0, BLOCK_P)
    return offs_g, mask_g, offs_c, mask_c, offs_p, offs_p < pixels


@triton.jit
def own_tile(num_groups, pixels, splits, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
             BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Row and split of a program's tile, its axes as of `tile_axes`, and the mask of both axes."""
    unit = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    chunks = tl.cdiv(num_groups, GROUPS)
    row = unit // chunks
    offs_g, mask_g, offs_c, mask_c, offs_p, mask_p = tile_axes(
        unit % chunks, split, num_groups, pixels, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    mask = mask_c[:, None] & mask_p[None, :]
    return row, split, offs_g, mask_g, offs_c, mask_c, offs_p, mask


@triton.jit
def tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """[BLOCK_C, BLOCK_P] offsets inside one row."""
    if CHANNELS_LAST:
        offsets = offs_p[None, :] * channels + offs_c[:, None]
    else:
        offsets = offs_c[:, None] * pixels + offs_p[None, :]
    return offsets


@triton.jit
def memberships(GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_G, BLOCK_C]: which channel of a tile lies in which of its groups."""
    return tl.arange(0, BLOCK_G)[:, None] == (tl.arange(0, BLOCK_C) // GROUP_SIZE)[None, :]


@triton.jit
def by_group(values, member):
    """[BLOCK_C] summed to [BLOCK_G]."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def by_channel(values, member):
    """[BLOCK_G] spread to [BLOCK_C]."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def tile_moments(x, mask, member, count):
    """Mean and centred squares [BLOCK_G] of a tile with `count` values a group; x is 0 outside."""
    mean = by_group(tl.sum(x, axis=1), member) / count
    centred = tl.where(mask, x - by_channel(mean, member)[:, None], 0.0)
    # What rounding left in the mean: at a mean of 100 it is 1e-5, seen in the output.
    rest = by_group(tl.sum(centred, axis=1), member) / count
    squares = by_group(tl.sum(centred * centred, axis=1), member)
    return mean + rest, squares - rest * rest * count


@triton.jit
def store_moments(partial_ptr, plane, mean, squares, rows_of_groups, mask_g, split, splits):
    """Writes a tile's moments to partial [2, rows * groups, splits]."""
    offsets = rows_of_groups.to(tl.int64) * splits + split
    tl.store(partial_ptr + offsets, mean, mask=mask_g)
    tl.store(partial_ptr + plane + offsets, squares, mask=mask_g)


@triton.jit
def merge_moments(partial_ptr, plane, rows_of_groups, mask_g, splits, pixels,
                  GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr,
                  BLOCK_P: tl.constexpr):  # fmt: skip
    """Mean and centred squares [BLOCK_G] of whole groups from those of their tiles."""
    BLOCK_S: tl.constexpr = 32
    base = partial_ptr + rows_of_groups.to(tl.int64) * splits
    pivot = tl.load(base, mask=mask_g, other=0.0)
    mean = tl.zeros([BLOCK_G], dtype=tl.float32)
    for start in range(0, bound(splits), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = mask_g[:, None] & (offs_s < splits)[None, :]
        count = tl.minimum(pixels - offs_s * BLOCK_P, BLOCK_P).to(tl.float32)
        means = tl.load(base[:, None] + offs_s[None, :], mask=mask, other=0.0)
        mean += tl.sum(tl.where(mask, (means - pivot[:, None]) * count[None, :], 0.0), axis=1)
    mean = pivot + mean / pixels
    squares = tl.zeros([BLOCK_G], dtype=tl.float32)
    for start in range(0, bound(splits), BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = mask_g[:, None] & (offs_s < splits)[None, :]
        count = tl.minimum(pixels - offs_s * BLOCK_P, BLOCK_P).to(tl.float32) * GROUP_SIZE
        means = tl.load(base[:, None] + offs_s[None, :], mask=mask, other=0.0)
        inside = tl.load(base[:, None] + plane + offs_s[None, :], mask=mask, other=0.0)
        apart = means - mean[:, None]
        squares += tl.sum(tl.where(mask, inside + apart * apart * count[None, :], 0.0), axis=1)
    return mean, squares


@triton.jit
def reciprocal_deviation(squares, count, eps):
    return 1.0 / tl.sqrt_rn(squares / count + eps)


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def silu_slope(z):
    gate = 1.0 / (1.0 + tl.exp(-z))
    return gate * (1.0 + z * (1.0 - gate))


@triton.jit
def group_terms(grad_sum, product_sum, weight, member, count):
    """What the gradient of GroupNorm at x subtracts: a constant and a factor of the normalised x.

    grad_sum and product_sum [BLOCK_C] are the sums over pixels of the gradient at the norm's output
    and of its product with the normalised x. With grad and normal at one place, the gradient at x
    is rstd * (weight * grad - constant - factor * normal).
    """
    constant = by_channel(by_group(weight * grad_sum, member), member) / count
    factor = by_channel(by_group(weight * product_sum, member), member) / count
    return constant, factor


# One program reads one tile of hidden + shared + time embedding (those that there are) and writes
# mean and centred squares of its part of each group, float32, to partial [2, rows * groups,
# splits].
@triton.jit
def moments_kernel(
    hidden_ptr,
    shared_ptr,
    embedding_ptr,
    partial_ptr,
    plane,
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
    HAS_SHARED: tl.constexpr,
    HAS_EMBEDDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    row, split, offs_g, mask_g, offs_c, mask_c, offs_p, mask = own_tile(
        num_groups, pixels, splits, GROUPS, GROUP_SIZE, BLOCK_G, BLOCK_C, BLOCK_P
    )
    x = load_sum(
        hidden_ptr, shared_ptr, embedding_ptr, row, batch, offs_c, mask_c, offs_p, mask,
        num_groups * GROUP_SIZE, pixels, HAS_HIDDEN, HAS_SHARED, HAS_EMBEDDING, CHANNELS_LAST,
    )  # fmt: skip
    count = tl.minimum(pixels - split * BLOCK_P, BLOCK_P).to(tl.float32) * GROUP_SIZE
    member = memberships(GROUP_SIZE, BLOCK_G, BLOCK_C)
    mean, squares = tile_moments(x, mask, member, count)
    rows_of_groups = row * num_groups + offs_g
    store_moments(partial_ptr, plane, mean, squares, rows_of_groups, mask_g, split, splits)


@triton.jit
def load_sum(hidden_ptr, shared_ptr, embedding_ptr, row, batch, offs_c, mask_c, offs_p, mask,
             channels, pixels, HAS_HIDDEN: tl.constexpr, HAS_SHARED: tl.constexpr,
             HAS_EMBEDDING: tl.constexpr, CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """float32 tile of hidden[row] + shared[row % batch] + embedding[row], 0 outside."""
    offsets = tile_offsets(offs_c, offs_p, channels, pixels, CHANNELS_LAST)
    x = tl.zeros([offs_c.shape[0], offs_p.shape[0]], dtype=tl.float32)
    if HAS_HIDDEN:
        start = hidden_ptr + row.to(tl.int64) * channels * pixels
        x += tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHARED:
        start = shared_ptr + (row % batch).to(tl.int64) * channels * pixels
        x += tl.load(start + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_EMBEDDING:
        place = row.to(tl.int64) * channels + offs_c
        embedding = tl.load(embedding_ptr + place, mask=mask_c, other=0.0).to(tl.float32)
        x = tl.where(mask, x + embedding[:, None], 0.0)
    return x


@triton.jit
def load_statistics(stats_ptr, rows, row, num_groups, offs_c, mask_c, GROUP_SIZE: tl.constexpr):
    """Mean and rstd [BLOCK_C] of stats [2, rows, groups] by channel."""
    place = stats_ptr + row.to(tl.int64) * num_groups + offs_c // GROUP_SIZE
    mean = tl.load(place, mask=mask_c, other=0.0)
    rstd = tl.load(place + rows * num_groups, mask=mask_c, other=0.0)
    return mean, rstd


@triton.jit
def store_statistics(stats_ptr, rows, row, num_groups, offs_g, mask_g, mean, rstd):
    """Writes stats [2, rows, groups]."""
    place = stats_ptr + row.to(tl.int64) * num_groups + offs_g
    tl.store(place, mean, mask=mask_g)
    tl.store(place + rows * num_groups, rstd, mask=mask_g)


@triton.jit
def load_affine(weight_ptr, bias_ptr, offs_c, mask_c):
    """Weight and bias [BLOCK_C], float32."""
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return weight, tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)


def new_maps(like: torch.Tensor, channels_last: bool, *shape: int) -> torch.Tensor:
    """Maps of another shape in the dtype and on the device of `like`, nothing written yet."""
    return torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def partials(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """float32 scratch on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def tile_moments_of(
    tiles: Plan,
    channels_last: bool,
    num_groups: int,
    rows: int,
    hidden: torch.Tensor | None,
    shared: torch.Tensor | None = None,
    embedding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launches `moments_kernel`: partial [2, rows * groups, splits]."""
    maps = shared if hidden is None else hidden
    assert maps is not None
    channels, pixels = maps.shape[1], maps.shape[2:].numel()
    partial = partials(maps, 2, rows * num_groups, tiles.splits)
    moments_kernel[(tiles.programs(rows, num_groups),)](
        hidden,
        shared,
        embedding,
        partial,
        partial[0].numel(),
        rows if shared is None else len(shared),
        num_groups,
        pixels,
        tiles.splits,
        GROUP_SIZE=channels // num_groups,
        HAS_HIDDEN=hidden is not None,
        HAS_SHARED=shared is not None,
        HAS_EMBEDDING=embedding is not None,
        CHANNELS_LAST=channels_last,
        **tiles.constexprs(),
    )
    return partial
