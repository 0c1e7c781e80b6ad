"""One small call of every public operator, and what it means in textbook PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tiue_kernels import functional

Tensors = tuple[torch.Tensor, ...]
K, B = 3, 2


@dataclass(frozen=True)
class Call:
    """A public operator on named tensors.

    Attributes:
        tensors: name to float64 tensor; parameters of norms included.
        run: the operator on these tensors.
        textbook: the same from torch's own functions, with everything repeated.
        operators: the keys of the dispatch table that it runs.
    """

    tensors: dict[str, torch.Tensor]
    run: Callable[..., Tensors]
    textbook: Callable[..., Tensors]
    operators: tuple[str, ...]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def repeat(rows: torch.Tensor) -> torch.Tensor:
    return rows.repeat(K, *[1] * (rows.ndim - 1))


def norm_silu(x, weight, bias, groups=4):
    return F.silu(F.group_norm(x, groups, weight, bias, 1e-5))


def _skip_norm(hidden, skip, weight, bias) -> Tensors:
    out = norm_silu(torch.cat([hidden, repeat(skip)], 1), weight, bias)
    return out[:, :12], out[:B, 12:]


def _skip_conv(hidden, skip, norm_weight, norm_bias, weight, bias) -> Tensors:
    joined = torch.cat([hidden, repeat(skip)], 1)
    return (F.conv2d(norm_silu(joined, norm_weight, norm_bias), weight, bias, padding=1),)


def _add_norm(hidden, shared, temb, weight, bias) -> Tensors:
    return (norm_silu(hidden + repeat(shared) + temb[:, :, None, None], weight, bias),)


def _add_conv(hidden, shared, temb, norm_weight, norm_bias, weight, bias) -> Tensors:
    (active,) = _add_norm(hidden, shared, temb, norm_weight, norm_bias)
    return (F.conv2d(active, weight, bias, padding=1),)


def _attention(query, key, value, bias=None) -> Tensors:
    def heads(x):
        return x.unflatten(2, (2, -1)).transpose(1, 2)

    mask = None if bias is None else repeat(bias)[:, None].to(query.dtype)
    query, key, value = heads(query), heads(repeat(key)), heads(repeat(value))
    out = F.scaled_dot_product_attention(query, key, value, mask)
    return (out.transpose(1, 2).flatten(2),)


def _feed_forward(x, norm_weight, norm_bias, up, up_bias, down, down_bias) -> Tensors:
    x = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), up, up_bias)
    first, second = x.chunk(2, -1)
    return (F.linear(first * F.gelu(second), down, down_bias),)


def _run_feed_forward(recompute: bool) -> Callable[..., Tensors]:
    def run(x, norm_weight, norm_bias, up, up_bias, down, down_bias) -> Tensors:
        return (
            functional.geglu_feed_forward(
                *(x, up, up_bias, down, down_bias, norm_weight, norm_bias),
                recompute_projection=recompute,
            ),
        )

    return run


def _projections(x, norm_weight, norm_bias, first, second) -> Tensors:
    x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    return F.linear(x, first), F.linear(x, second)


def _modulated(x, scale, shift) -> Tensors:
    x = F.layer_norm(repeat(x), x.shape[-1:], eps=1e-6)
    return (x * (1 + scale[:, None]) + shift[:, None],)


def _modulated_projections(x, scale, shift, first, second, *biases) -> Tensors:
    (x,) = _modulated(x, scale, shift)
    biases = biases or (None, None)
    return F.linear(x, first, biases[0]), F.linear(x, second, biases[1])


def _gated_linear(x, gate, tokens, weight, bias) -> Tensors:
    return (repeat(x) + gate[:, None] * F.linear(tokens, weight, bias),)


def _modulated_feed_forward(x, scale, shift, gate, up, up_bias, down, down_bias) -> Tensors:
    (tokens,) = _modulated(x, scale, shift)
    active = F.gelu(F.linear(tokens, up, up_bias), approximate="tanh")
    return _gated_linear(x, gate, active, down, down_bias)


def _run_modulated_feed_forward(recompute: bool) -> Callable[..., Tensors]:
    return lambda *t: (functional.adaptive_feed_forward(*t, recompute_projection=recompute),)


def _long_skip(hidden, skip, norm_weight, norm_bias, weight, bias) -> Tensors:
    joined = torch.cat([hidden, repeat(skip)], dim=-1)
    joined = F.layer_norm(joined, joined.shape[-1:], norm_weight, norm_bias, 1e-6)
    return (F.linear(joined, weight, bias),)


def _pixels(x, norm_weight, norm_bias, weight, bias) -> Tensors:
    x = F.group_norm(x, 4, norm_weight, norm_bias, 1e-6)
    tokens = x.flatten(2).transpose(1, 2).contiguous()  # as diffusers lays them
    return (F.linear(tokens, weight, bias),)


def _geglu(x) -> Tensors:
    first, second = x.chunk(2, -1)
    return (first * F.gelu(second),)


def _kl(noise_pred) -> Tensors:
    maps = noise_pred.flatten(-3)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    variance, mean = torch.var_mean(maps, -1)
    return (0.5 * (mean**2 + variance - 1 - variance.log()),)


_tokens = {
    "query": noise(K * B, 5, 16),
    "key": noise(B, 7, 16),
    "value": noise(B, 7, 16, seed=1),
}
_mask = torch.zeros(B, 1, 7)
_mask[0, :, 4:] = -torch.inf
_hidden = {"hidden": noise(K * B, 9, 4, 5)}
_skip = {"skip": noise(B, 7, 4, 5, seed=1)}
_norm = {"norm_weight": noise(16), "norm_bias": noise(16, seed=1)}
_conv = {"weight": noise(6, 16, 3, 3), "bias": noise(6)}
_rows = {
    "hidden": noise(K * B, 16, 4, 5),
    "shared": noise(B, 16, 4, 5, seed=1),
    "time_embedding": noise(K * B, 16),
}
_layer_norm = {"norm_weight": noise(8), "norm_bias": noise(8, seed=1)}
_feed = {
    "x": noise(K * B, 5, 8),
    **_layer_norm,
    "projection_weight": noise(24, 8),
    "projection_bias": noise(24),
    "weight": noise(8, 12),
    "bias": noise(8),
}
_modulation = {"scale": noise(K * B, 8), "shift": noise(K * B, 8, seed=1)}
_modulated_feed = {
    "x": noise(B, 5, 8),
    **_modulation,
    "gate": noise(K * B, 8, seed=2),
    "projection_weight": noise(12, 8),
    "projection_bias": noise(12),
    "weight": noise(8, 12),
    "bias": noise(8),
}
_E = (-2.5, -0.9, -0.6)

CALLS: dict[str, Call] = {
    "shared_skip_group_norm_silu": Call(
        {**_hidden, **_skip, **_norm},
        lambda h, s, w, b: functional.shared_skip_group_norm_silu(h, s, 4, w, b),
        _skip_norm,
        ("shared_skip_group_norm_silu",),
    ),
    "shared_skip_group_norm_silu_conv2d": Call(
        {**_hidden, **_skip, **_norm, **_conv},
        lambda h, s, nw, nb, w, b: (
            _sum(*functional.shared_skip_group_norm_silu_conv2d(h, s, 4, nw, nb, w, b, padding=1)),
        ),
        _skip_conv,
        ("shared_skip_group_norm_silu",),
    ),
    "group_norm_silu_conv2d": Call(
        {"x": _rows["hidden"], **_norm, **_conv},
        lambda x, nw, nb, w, b: (functional.group_norm_silu_conv2d(x, 4, nw, nb, w, b, padding=1),),
        lambda x, nw, nb, w, b: (F.conv2d(norm_silu(x, nw, nb), w, b, padding=1),),
        ("shared_skip_group_norm_silu",),
    ),
    "broadcast_add_group_norm_silu": Call(
        {**_rows, **_norm},
        lambda h, s, t, w, b: (functional.broadcast_add_group_norm_silu(h, s, t, 4, w, b),),
        _add_norm,
        ("broadcast_add_group_norm_silu",),
    ),
    "broadcast_add_group_norm_silu_conv2d": Call(
        {**_rows, **_norm, **_conv},
        lambda h, s, t, nw, nb, w, b: (
            functional.broadcast_add_group_norm_silu_conv2d(h, s, t, 4, nw, nb, w, b, padding=1),
        ),
        _add_conv,
        ("broadcast_add_group_norm_silu",),
    ),
    "timestep_sum_group_norm_silu": Call(
        {"hidden": _rows["hidden"], "coefficients": torch.tensor(_E).double(), **_norm},
        lambda h, e, w, b: (functional.timestep_sum_group_norm_silu(h, e, 4, w, b),),
        lambda h, e, w, b: (
            (
                norm_silu(h, w, b).unflatten(0, (K, B)) * e[:, None, None, None, None].to(h.dtype)
            ).sum(0),
        ),
        ("timestep_sum_group_norm_silu",),
    ),
    "cross_timestep_attention": Call(
        _tokens,
        lambda q, k, v: (functional.cross_timestep_attention(q, k, v, 2),),
        _attention,
        ("cross_timestep_attention",),
    ),
    "cross_timestep_attention_masked": Call(
        _tokens,
        lambda q, k, v: (functional.cross_timestep_attention(q, k, v, 2, attention_bias=_mask),),
        lambda q, k, v: _attention(q, k, v, _mask),
        ("cross_timestep_attention",),
    ),
    "geglu": Call({"x": noise(K * B, 5, 12)}, lambda x: (functional.geglu(x),), _geglu, ("geglu",)),
    "geglu_feed_forward": Call(_feed, _run_feed_forward(False), _feed_forward, ("geglu",)),
    "geglu_feed_forward_recompute": Call(_feed, _run_feed_forward(True), _feed_forward, ("geglu",)),
    "layer_norm_linear": Call(
        {"x": noise(K * B, 5, 8), **_layer_norm, "w0": noise(6, 8), "w1": noise(4, 8)},
        lambda x, nw, nb, *w: tuple(functional.layer_norm_linear(x, nw, nb, list(w))),
        _projections,
        (),
    ),
    "adaptive_layer_norm": Call(
        {"x": noise(B, 5, 8), "scale": noise(K * B, 8), "shift": noise(K * B, 8, seed=1)},
        lambda x, scale, shift: (functional.adaptive_layer_norm(x, scale, shift),),
        _modulated,
        ("adaptive_layer_norm",),
    ),
    "adaptive_layer_norm_linear": Call(
        {
            "x": noise(B, 5, 8),
            **_modulation,
            "w0": noise(6, 8),
            "w1": noise(4, 8),
            "b0": noise(6),
            "b1": noise(4),
        },
        lambda x, scale, shift, w0, w1, *biases: tuple(
            functional.adaptive_layer_norm_linear(x, scale, shift, [w0, w1], list(biases))
        ),
        _modulated_projections,
        ("adaptive_layer_norm",),
    ),
    "adaptive_layer_norm_linear_without_biases": Call(
        {"x": noise(B, 5, 8), **_modulation, "w0": noise(6, 8), "w1": noise(4, 8)},
        lambda x, scale, shift, *weights: tuple(
            functional.adaptive_layer_norm_linear(x, scale, shift, list(weights))
        ),
        _modulated_projections,
        ("adaptive_layer_norm",),
    ),
    "linear_gated_residual": Call(
        {
            "x": noise(B, 5, 8),
            "gate": noise(K * B, 8),
            "tokens": noise(K * B, 5, 6),
            "weight": noise(8, 6),
            "bias": noise(8),
        },
        lambda *tensors: (functional.linear_gated_residual(*tensors),),
        _gated_linear,
        ("gated_residual",),
    ),
    "adaptive_feed_forward": Call(
        _modulated_feed,
        _run_modulated_feed_forward(False),
        _modulated_feed_forward,
        ("adaptive_layer_norm", "gated_residual"),
    ),
    "adaptive_feed_forward_recompute": Call(
        _modulated_feed,
        _run_modulated_feed_forward(True),
        _modulated_feed_forward,
        ("adaptive_layer_norm", "gated_residual"),
    ),
    "shared_skip_layer_norm_linear": Call(
        {
            "hidden": noise(K * B, 5, 8),
            "skip": noise(B, 5, 6),
            "norm_weight": noise(14),
            "norm_bias": noise(14, seed=1),
            "weight": noise(7, 14),
            "bias": noise(7),
        },
        lambda *tensors: (functional.shared_skip_layer_norm_linear(*tensors),),
        _long_skip,
        ("shared_skip_layer_norm_linear",),
    ),
    "gated_residual": Call(
        {"x": noise(B, 5, 8), "gate": noise(K * B, 8), "y": noise(K * B, 5, 8)},
        lambda x, gate, y: (functional.gated_residual(x, gate, y),),
        lambda x, gate, y: (repeat(x) + gate[:, None] * y,),
        ("gated_residual",),
    ),
    "group_norm_linear": Call(
        {"x": _rows["hidden"], **_norm, "weight": noise(6, 16), "bias": noise(6)},
        lambda x, nw, nb, w, b: (functional.group_norm_linear(x, 4, nw, nb, w, b),),
        _pixels,
        ("group_norm_tokens",),
    ),
    "group_norm_tokens": Call(
        {"x": _rows["hidden"], **_norm},
        lambda x, w, b: (functional.group_norm_tokens(x, 4, w, b),),
        lambda x, w, b: (F.group_norm(x, 4, w, b, 1e-6).flatten(2).transpose(1, 2),),
        ("group_norm_tokens",),
    ),
    "upsample_conv2d": Call(
        {"x": noise(2, 4, 12, 12), "weight": noise(5, 4, 3, 3), "bias": noise(5)},
        lambda x, w, b: (functional.upsample_conv2d(x, w, b),),
        lambda x, w, b: (F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1),),
        ("conv2d",),
    ),
    "one_pass_combine": Call(
        {
            "latents": noise(B, 4, 3, 3),
            "noise_pred": noise(K, B, 4, 3, 3),
            "noise_coefficients": torch.tensor(_E).double(),
        },
        lambda z, n, e: (functional.one_pass_combine(z, n, 4.2, e),),
        lambda z, n, e: (4.2 * z + (e[:, None, None, None, None].to(n.dtype) * n).sum(0),),
        ("one_pass_combine",),
    ),
    "noise_kl": Call(
        {"noise_pred": noise(K, B, 4, 3, 3)},
        lambda n: (functional.noise_kl(n),),
        _kl,
        ("noise_kl",),
    ),
}


def _sum(rows: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    return rows + repeat(shared)
