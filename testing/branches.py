"""The problems of the operators for a transformer block's branches; see `testing.operators`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from testing.problem import Draw, Problem, Tensors
from testing.shapes import Transformer
from tiue_kernels import functional

EPS = 1e-6


def _modulated(draw: Draw, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor):
    x = draw.repeat(F.layer_norm(x, x.shape[-1:], eps=EPS))
    return x * (1 + scale[:, None]) + shift[:, None]


def _modulation(draw: Draw, channels: int) -> dict[str, torch.Tensor]:
    return {name: draw(draw.rows, channels, scale=0.5) for name in ("scale", "shift")}


def adaptive_layer_norm_linear(sizes: Transformer, draw: Draw) -> Problem:
    """Query, key and value of the first self-attention behind the shared blocks."""
    channels, tokens = sizes.channels, sizes.height * sizes.width

    def run(x, scale, shift, *layers) -> Tensors:
        weights, biases = list(layers[:3]), list(layers[3:])
        return tuple(functional.adaptive_layer_norm_linear(x, scale, shift, weights, biases))

    def eager(x, scale, shift, *layers) -> Tensors:
        x = _modulated(draw, x, scale, shift)
        pairs = zip(layers[:3], layers[3:], strict=True)
        return tuple(F.linear(x, weight, bias) for weight, bias in pairs)

    tensors = {
        "x": draw(draw.batch, tokens, channels),
        **_modulation(draw, channels),
        **{f"{name}_weight": draw.weight(channels, channels) for name in ("q", "k", "v")},
        **{f"{name}_bias": draw(channels) for name in ("q", "k", "v")},
    }
    return Problem(tensors, run, eager, flops=6 * draw.rows * tokens * channels**2)


def linear_gated_residual(sizes: Transformer, draw: Draw) -> Problem:
    """The output of that attention."""
    channels, tokens = sizes.channels, sizes.height * sizes.width

    def run(*tensors) -> Tensors:
        return (functional.linear_gated_residual(*tensors),)

    def eager(x, gate, own, weight, bias) -> Tensors:
        return (draw.repeat(x) + gate[:, None] * F.linear(own, weight, bias),)

    tensors = {
        "x": draw(draw.batch, tokens, channels),
        "gate": draw(draw.rows, channels),
        "tokens": draw(draw.rows, tokens, channels),
        "weight": draw.weight(channels, channels),
        "bias": draw(channels),
    }
    return Problem(tensors, run, eager, flops=2 * draw.rows * tokens * channels**2)


def adaptive_feed_forward(sizes: Transformer, draw: Draw) -> Problem:
    channels, tokens = sizes.channels, sizes.height * sizes.width

    def run(*tensors) -> Tensors:
        return (functional.adaptive_feed_forward(*tensors),)

    def eager(x, scale, shift, gate, up, up_bias, down, down_bias) -> Tensors:
        active = F.linear(_modulated(draw, x, scale, shift), up, up_bias)
        branch = F.linear(F.gelu(active, approximate="tanh"), down, down_bias)
        return (draw.repeat(x) + gate[:, None] * branch,)

    tensors = {
        "x": draw(draw.batch, tokens, channels),
        **_modulation(draw, channels),
        "gate": draw(draw.rows, channels),
        "projection_weight": draw.weight(4 * channels, channels),
        "projection_bias": draw(4 * channels),
        "weight": draw.weight(channels, 4 * channels),
        "bias": draw(channels),
    }
    return Problem(tensors, run, eager, flops=16 * draw.rows * tokens * channels**2)
