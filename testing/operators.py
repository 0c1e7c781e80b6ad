"""Every operator as a problem: its tensors, our call, eager torch's form, and the work in it.

FLOPs are those of the matrix products alone, two a multiply-add, in the cheapest exact form:
nothing repeated, skips once, phases for upsampling.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from testing.branches import (
    adaptive_feed_forward,
    adaptive_layer_norm_linear,
    linear_gated_residual,
)
from testing.problem import LATENT_COEFFICIENT, Draw, Problem, Tensors
from testing.shapes import (
    Attention,
    Latents,
    Output,
    Resnet,
    Sizes,
    Transformer,
    Upsampler,
    select,
)
from tiue_kernels import dispatch, functional

EPS = 1e-5
MOST_SCORES = 2**27  # of exact attention, at a time: 1 GiB in float64


@dataclass(frozen=True)
class Operator:
    """How problems of one operator are made.

    Attributes:
        build: Sizes and a `Draw` to a problem.
        key: What of the sizes matters to it; None for sizes that it does not meet.
    """

    build: Callable[[Any, Draw], Problem]
    key: Callable[[Sizes], Hashable | None]

    def shapes(self, *pixels: int) -> dict[str, Sizes]:
        """The distinct shapes that the published decoders ask of it, at these sizes of picture."""
        return select(self.key, *pixels)


def kernel_backends(name: str) -> tuple[str, ...]:
    """The backends that have GPU kernels of this operator; of a composition, none."""
    table = dispatch.TABLE.get(name, {})
    return tuple(backend for backend in table if backend not in dispatch.ON_CPU)


def norm_silu(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor):
    return F.silu(F.group_norm(x, groups, weight, bias, EPS))


def shared_skip_group_norm_silu(sizes: Resnet, draw: Draw) -> Problem:
    channels, groups = sizes.hidden + sizes.skip, sizes.groups
    border = first_skip_channel(sizes)

    def run(hidden, skip, weight, bias) -> Tensors:
        return functional.shared_skip_group_norm_silu(hidden, skip, groups, weight, bias, EPS)

    def eager(hidden, skip, weight, bias) -> Tensors:
        return (norm_silu(torch.cat([hidden, draw.repeat(skip)], 1), groups, weight, bias),)

    def cut(*tensors) -> Tensors:
        (out,) = eager(*tensors)
        return out[:, :border], out[: draw.batch, border:]

    tensors = {
        "hidden": draw(draw.rows, sizes.hidden, sizes.height, sizes.width),
        "skip": draw(draw.batch, sizes.skip, sizes.height, sizes.width),
        **draw.norm(channels),
    }
    return Problem(tensors, run, eager, cut=cut)


def shared_skip_group_norm_silu_conv2d(sizes: Resnet, draw: Draw) -> Problem:
    channels, groups = sizes.hidden + sizes.skip, sizes.groups
    border = first_skip_channel(sizes)

    def run(hidden, skip, norm_weight, norm_bias, weight, bias) -> Tensors:
        norm = (groups, norm_weight, norm_bias)
        return functional.shared_skip_group_norm_silu_conv2d(
            hidden, skip, *norm, weight, bias, EPS, padding=1
        )

    def joined(*tensors) -> Tensors:
        rows, shared = run(*tensors)
        return (rows + draw.repeat(shared),)

    def eager(hidden, skip, norm_weight, norm_bias, weight, bias) -> Tensors:
        both = torch.cat([hidden, draw.repeat(skip)], 1)
        return (F.conv2d(norm_silu(both, groups, norm_weight, norm_bias), weight, bias, padding=1),)

    tensors = {
        "hidden": draw(draw.rows, sizes.hidden, sizes.height, sizes.width),
        "skip": draw(draw.batch, sizes.skip, sizes.height, sizes.width),
        **draw.norm(channels),
        "weight": draw.weight(sizes.out, channels, 3, 3),
        "bias": draw(sizes.out),
    }
    # The skip's own groups meet the kernel once a sample.
    columns = draw.rows * border + draw.batch * (channels - border)
    flops = 18 * sizes.height * sizes.width * sizes.out * columns
    return Problem(tensors, run, eager, flops, joined=joined)


def group_norm_silu_conv2d(sizes: Resnet, draw: Draw) -> Problem:
    """The decoder's first resnet: nothing depends on the timestep yet."""
    channels, groups = sizes.hidden + sizes.skip, sizes.groups

    def run(x, norm_weight, norm_bias, weight, bias) -> Tensors:
        norm = (groups, norm_weight, norm_bias)
        return (functional.group_norm_silu_conv2d(x, *norm, weight, bias, EPS, padding=1),)

    def eager(x, norm_weight, norm_bias, weight, bias) -> Tensors:
        return (F.conv2d(norm_silu(x, groups, norm_weight, norm_bias), weight, bias, padding=1),)

    tensors = {
        "x": draw(draw.batch, channels, sizes.height, sizes.width),
        **draw.norm(channels),
        "weight": draw.weight(sizes.out, channels, 3, 3),
        "bias": draw(sizes.out),
    }
    flops = 18 * draw.batch * sizes.height * sizes.width * sizes.out * channels
    return Problem(tensors, run, eager, flops)


def broadcast_add_group_norm_silu(sizes: Resnet, draw: Draw) -> Problem:
    def run(*tensors) -> Tensors:
        *maps, temb, weight, bias = tensors
        hidden, shared = maps if len(maps) == 2 else (None, *maps)
        norm = (sizes.groups, weight, bias, EPS)
        return (functional.broadcast_add_group_norm_silu(hidden, shared, temb, *norm),)

    def eager(*tensors) -> Tensors:
        *maps, temb, weight, bias = tensors
        rows = draw.repeat(maps[-1])
        rows = rows + maps[0] if len(maps) == 2 else rows
        return (norm_silu(rows + temb[:, :, None, None], sizes.groups, weight, bias),)

    return Problem(_added(sizes, draw), run, eager)


def broadcast_add_group_norm_silu_conv2d(sizes: Resnet, draw: Draw) -> Problem:
    norm_only = broadcast_add_group_norm_silu(sizes, draw)

    def run(*tensors) -> Tensors:
        *maps, temb, norm_weight, norm_bias, weight, bias = tensors
        hidden, shared = maps if len(maps) == 2 else (None, *maps)
        norm = (sizes.groups, norm_weight, norm_bias)
        return (
            functional.broadcast_add_group_norm_silu_conv2d(
                hidden, shared, temb, *norm, weight, bias, EPS, padding=1
            ),
        )

    def eager(*tensors) -> Tensors:
        *rest, weight, bias = tensors
        return (F.conv2d(*norm_only.eager(*rest), weight, bias, padding=1),)

    tensors = norm_only.tensors | {
        "weight": draw.weight(sizes.out, sizes.out, 3, 3),
        "bias": draw(sizes.out),
    }
    flops = 18 * draw.rows * sizes.height * sizes.width * sizes.out**2
    return Problem(tensors, run, eager, flops)


def _added(sizes: Resnet, draw: Draw) -> dict[str, torch.Tensor]:
    """What a resnet's second norm reads; the first resnet's rows do not differ yet."""
    shape = (sizes.out, sizes.height, sizes.width)
    hidden = {} if sizes.shared else {"hidden": draw(draw.rows, *shape)}
    return {
        **hidden,
        "shared": draw(draw.batch, *shape),
        "time_embedding": draw(draw.rows, sizes.out),
        **draw.norm(sizes.out),
    }


def timestep_sum_group_norm_silu(sizes: Output, draw: Draw) -> Problem:
    groups = sizes.groups

    def run(hidden, coefficients, weight, bias) -> Tensors:
        norm = (groups, weight, bias, EPS)
        return (functional.timestep_sum_group_norm_silu(hidden, coefficients, *norm),)

    def eager(hidden, coefficients, weight, bias) -> Tensors:
        active = norm_silu(hidden, groups, weight, bias).unflatten(0, (draw.timesteps, draw.batch))
        return ((active * coefficients.to(active.dtype)[:, None, None, None, None]).sum(0),)

    tensors = {
        "hidden": draw(draw.rows, sizes.channels, sizes.height, sizes.width),
        "coefficients": draw.coefficients(),
        **draw.norm(sizes.channels),
    }
    return Problem(tensors, run, eager, constants=("coefficients",))


def cross_timestep_attention(sizes: Attention, draw: Draw) -> Problem:
    channels = sizes.heads * sizes.head_dim
    key_rows = draw.rows if sizes.own else draw.batch

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (sizes.heads, sizes.head_dim)).transpose(1, 2)

    def run(query, key, value) -> Tensors:
        return (functional.cross_timestep_attention(query, key, value, sizes.heads),)

    def eager(query, key, value) -> Tensors:
        if not sizes.own:
            key, value = draw.repeat(key), draw.repeat(value)
        out = F.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        return (out.transpose(1, 2).flatten(2),)

    def attend(query, key, value) -> torch.Tensor:
        return (query @ key.mT * sizes.head_dim**-0.5).softmax(-1) @ value

    def exact(query, key, value) -> Tensors:
        if not sizes.own:
            key, value = draw.repeat(key), draw.repeat(value)
        query, key, value = (heads(x) for x in (query, key, value))
        chunk = max(1, MOST_SCORES // (len(query) * sizes.heads * sizes.keys))
        # What a chunk's backward needs is computed again: 69 GB of scores at 16384 tokens.
        parts = [
            checkpoint(attend, part, key, value, use_reentrant=False)
            for part in query.split(chunk, 2)
        ]
        return (torch.cat(parts, 2).transpose(1, 2).flatten(2),)

    tensors = {
        "query": draw(draw.rows, sizes.tokens, channels),
        "key": draw(key_rows, sizes.keys, channels),
        "value": draw(key_rows, sizes.keys, channels),
    }
    product = 2 * draw.rows * sizes.tokens * sizes.keys * channels
    return Problem(tensors, run, eager, flops=2 * product, backward_flops=5 * product, exact=exact)


def geglu(sizes: Transformer, draw: Draw) -> Problem:
    def eager(x) -> Tensors:
        first, second = x.chunk(2, -1)
        return (first * F.gelu(second),)

    x = draw(draw.rows, sizes.height * sizes.width, 8 * sizes.channels)
    return Problem({"x": x}, lambda x: (functional.geglu(x),), eager)


def geglu_feed_forward(sizes: Transformer, draw: Draw) -> Problem:
    channels, tokens = sizes.channels, sizes.height * sizes.width

    def run(x, norm_weight, norm_bias, up, up_bias, down, down_bias) -> Tensors:
        linears = (up, up_bias, down, down_bias)
        return (functional.geglu_feed_forward(x, *linears, norm_weight, norm_bias),)

    def eager(x, norm_weight, norm_bias, up, up_bias, down, down_bias) -> Tensors:
        x = F.linear(F.layer_norm(x, (channels,), norm_weight, norm_bias), up, up_bias)
        first, second = x.chunk(2, -1)
        return (F.linear(first * F.gelu(second), down, down_bias),)

    tensors = {
        "x": draw(draw.rows, tokens, channels),
        **draw.norm(channels),
        "projection_weight": draw.weight(8 * channels, channels),
        "projection_bias": draw(8 * channels),
        "weight": draw.weight(channels, 4 * channels),
        "bias": draw(channels),
    }
    return Problem(tensors, run, eager, flops=24 * draw.rows * tokens * channels**2)


def layer_norm_linear(sizes: Transformer, draw: Draw) -> Problem:
    """Query, key and value of self attention."""
    channels, tokens = sizes.channels, sizes.height * sizes.width

    def run(x, norm_weight, norm_bias, *weights) -> Tensors:
        return tuple(functional.layer_norm_linear(x, norm_weight, norm_bias, list(weights)))

    def eager(x, norm_weight, norm_bias, *weights) -> Tensors:
        x = F.layer_norm(x, (channels,), norm_weight, norm_bias)
        return tuple(F.linear(x, weight) for weight in weights)

    tensors = {
        "x": draw(draw.rows, tokens, channels),
        **draw.norm(channels),
        **{f"{name}_weight": draw.weight(channels, channels) for name in ("q", "k", "v")},
    }
    return Problem(tensors, run, eager, flops=6 * draw.rows * tokens * channels**2)


def adaptive_layer_norm(sizes: Transformer, draw: Draw) -> Problem:
    """The first modulation behind the blocks that all timesteps share."""
    channels, tokens = sizes.channels, sizes.height * sizes.width

    def run(x, scale, shift) -> Tensors:
        return (functional.adaptive_layer_norm(x, scale, shift, EPS),)

    def eager(x, scale, shift) -> Tensors:
        x = draw.repeat(F.layer_norm(x, (channels,), eps=EPS))
        return (x * (1 + scale[:, None]) + shift[:, None],)

    tensors = {
        "x": draw(draw.batch, tokens, channels),
        "scale": draw(draw.rows, channels),
        "shift": draw(draw.rows, channels),
    }
    return Problem(tensors, run, eager)


def shared_skip_layer_norm_linear(sizes: Transformer, draw: Draw) -> Problem:
    """A long skip of Hunyuan-DiT, whose halves are equally wide."""
    channels, tokens = sizes.channels, sizes.height * sizes.width

    def run(hidden, skip, norm_weight, norm_bias, weight, bias) -> Tensors:
        norm = (norm_weight, norm_bias)
        return (functional.shared_skip_layer_norm_linear(hidden, skip, *norm, weight, bias),)

    def eager(hidden, skip, norm_weight, norm_bias, weight, bias) -> Tensors:
        joined = torch.cat([hidden, draw.repeat(skip)], dim=-1)
        joined = F.layer_norm(joined, (2 * channels,), norm_weight, norm_bias, 1e-6)
        return (F.linear(joined, weight, bias),)

    tensors = {
        "hidden": draw(draw.rows, tokens, channels),
        "skip": draw(draw.batch, tokens, channels),
        **draw.norm(2 * channels),
        "weight": draw.weight(channels, 2 * channels),
        "bias": draw(channels),
    }
    halves = (draw.rows + draw.batch) * tokens * channels**2
    return Problem(tensors, run, eager, flops=2 * halves)


def gated_residual(sizes: Transformer, draw: Draw) -> Problem:
    """The first branch that joins tokens which all timesteps share."""
    channels, tokens = sizes.channels, sizes.height * sizes.width

    def run(x, gate, y) -> Tensors:
        return (functional.gated_residual(x, gate, y),)

    def eager(x, gate, y) -> Tensors:
        return (draw.repeat(x) + gate[:, None] * y,)

    tensors = {
        "x": draw(draw.batch, tokens, channels),
        "gate": draw(draw.rows, channels),
        "y": draw(draw.rows, tokens, channels),
    }
    return Problem(tensors, run, eager)


def group_norm_tokens(sizes: Transformer, draw: Draw) -> Problem:
    channels, groups = sizes.channels, sizes.groups

    def run(x, weight, bias) -> Tensors:
        return (functional.group_norm_tokens(x, groups, weight, bias),)

    def eager(x, weight, bias) -> Tensors:
        x = F.group_norm(x, groups, weight, bias, 1e-6)
        return (x.flatten(2).transpose(1, 2).contiguous(),)

    norm = dict(zip(("weight", "bias"), draw.norm(channels).values(), strict=True))
    tensors = {"x": draw(draw.rows, channels, sizes.height, sizes.width), **norm}
    return Problem(tensors, run, eager)


def group_norm_linear(sizes: Transformer, draw: Draw) -> Problem:
    channels, groups = sizes.channels, sizes.groups

    def run(x, norm_weight, norm_bias, weight, bias) -> Tensors:
        return (functional.group_norm_linear(x, groups, norm_weight, norm_bias, weight, bias),)

    def eager(x, norm_weight, norm_bias, weight, bias) -> Tensors:
        x = F.group_norm(x, groups, norm_weight, norm_bias, 1e-6)
        return (F.linear(x.flatten(2).transpose(1, 2), weight, bias),)

    tensors = {
        "x": draw(draw.rows, channels, sizes.height, sizes.width),
        **draw.norm(channels),
        "weight": draw.weight(channels, channels),
        "bias": draw(channels),
    }
    flops = 2 * draw.rows * sizes.height * sizes.width * channels**2
    return Problem(tensors, run, eager, flops)


def upsample_conv2d(sizes: Upsampler, draw: Draw) -> Problem:
    def eager(x, weight, bias) -> Tensors:
        return (F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1),)

    tensors = {
        "x": draw(draw.rows, sizes.channels, sizes.height, sizes.width),
        "weight": draw.weight(sizes.channels, sizes.channels, 3, 3),
        "bias": draw(sizes.channels),
    }
    # Four phases of 2 x 2 taps.
    flops = 32 * draw.rows * sizes.height * sizes.width * sizes.channels**2
    return Problem(tensors, lambda *args: (functional.upsample_conv2d(*args),), eager, flops)


def one_pass_combine(sizes: Latents, draw: Draw) -> Problem:
    def run(latents, noise_pred, coefficients) -> Tensors:
        return (functional.one_pass_combine(latents, noise_pred, LATENT_COEFFICIENT, coefficients),)

    def eager(latents, noise_pred, coefficients) -> Tensors:
        scaled = noise_pred * coefficients.to(noise_pred.dtype)[:, None, None, None, None]
        return (LATENT_COEFFICIENT * latents + scaled.sum(0),)

    tensors = {
        "latents": draw(draw.batch, *sizes),
        "noise_pred": draw(draw.timesteps, draw.batch, *sizes),
        "coefficients": draw.coefficients(),
    }
    return Problem(tensors, run, eager, constants=("coefficients",), unsaved=("latents",))


def noise_kl(sizes: Latents, draw: Draw) -> Problem:
    def eager(noise_pred) -> Tensors:
        maps = noise_pred.flatten(-3)
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        variance, mean = torch.var_mean(maps, -1)
        return (0.5 * (mean**2 + variance - 1 - variance.log()),)

    # Of another variance than 1: there the terms of the divergence cancel.
    noise_pred = draw(draw.timesteps, draw.batch, *sizes, scale=1.5)
    return Problem({"noise_pred": noise_pred}, lambda x: (functional.noise_kl(x),), eager)


def first_skip_channel(sizes: Resnet) -> int:
    """The first channel of the first group that lies wholly in the skip."""
    group = (sizes.hidden + sizes.skip) // sizes.groups
    return -(-sizes.hidden // group) * group


def _of(kind: type, fields: Callable[[Any], Hashable] = tuple) -> Callable[[Sizes], Any]:
    return lambda sizes: fields(sizes) if isinstance(sizes, kind) else None


def _unless_shared(sizes: Resnet) -> Hashable | None:
    return None if sizes.shared else tuple(sizes)


def _first(sizes: Resnet) -> Hashable | None:
    return tuple(sizes) if sizes.shared else None


def _added_map(sizes: Resnet) -> Hashable:
    return sizes.out, sizes.height, sizes.width, sizes.shared


def _tokens(sizes: Transformer) -> Hashable:
    return sizes.channels, sizes.height * sizes.width


OPERATORS: dict[str, Operator] = {
    function.__name__: Operator(function, key)
    for function, key in (
        (shared_skip_group_norm_silu, _of(Resnet, _unless_shared)),
        (broadcast_add_group_norm_silu, _of(Resnet, _added_map)),
        (timestep_sum_group_norm_silu, _of(Output)),
        (cross_timestep_attention, _of(Attention)),
        (adaptive_layer_norm, _of(Transformer, _tokens)),
        (gated_residual, _of(Transformer, _tokens)),
        (shared_skip_layer_norm_linear, _of(Transformer, _tokens)),
        (group_norm_tokens, _of(Transformer, _tokens)),
        (geglu, _of(Transformer, _tokens)),
        (one_pass_combine, _of(Latents)),
        (noise_kl, _of(Latents)),
        (upsample_conv2d, _of(Upsampler)),
        (group_norm_silu_conv2d, _of(Resnet, _first)),
        (shared_skip_group_norm_silu_conv2d, _of(Resnet, _unless_shared)),
        (broadcast_add_group_norm_silu_conv2d, _of(Resnet, _added_map)),
        (geglu_feed_forward, _of(Transformer)),
        (layer_norm_linear, _of(Transformer)),
        (group_norm_linear, _of(Transformer)),
        (adaptive_layer_norm_linear, _of(Transformer, _tokens)),
        (linear_gated_residual, _of(Transformer, _tokens)),
        (adaptive_feed_forward, _of(Transformer, _tokens)),
    )
}
