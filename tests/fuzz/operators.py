"""Calls of the operators with drawn shapes, strides, types and values, on two backends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from tiue_kernels import dispatch, functional, use_backend

Tensors = tuple[torch.Tensor, ...]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Powers of two that values are multiplied by: squares and sums of them stay within the type.
SCALES = {torch.float32: 40, torch.float16: 4, torch.bfloat16: 40}
# Sums of a few hundred terms in another order, relative to the largest value of the result.
FLOOR = 256


@dataclass
class Call:
    """One call: tensors by name, and the operator on them."""

    operator: str
    tensors: dict[str, torch.Tensor]
    run: Callable[..., Any]
    normed: tuple[torch.Tensor, int, float] | None = None  # what is normed, in groups, epsilon
    heads: int = 0  # of attention
    gain: float = 0.0  # sum of a product's weights behind the norm, at most; 0 without one

    def on(self, backend: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Outputs and gradients by name, the tensors in another type where one is given."""
        leaves = {
            name: (x if dtype is None else x.to(dtype)).detach().requires_grad_()
            for name, x in self.tensors.items()
        }
        with use_backend(backend):
            outs = self.run(**leaves)
            outs = outs if isinstance(outs, tuple) else (outs,)
            grads = [torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype) for x in outs]
            slopes = torch.autograd.grad(outs, list(leaves.values()), grads, allow_unused=True)
        named = {f"out {i}": x.detach() for i, x in enumerate(outs)}
        return named | {
            f"grad of {name}": x for name, x in zip(leaves, slopes, strict=True) if x is not None
        }


@st.composite
def calls(draw: Callable[..., Any], backend: str) -> Call:
    """Any operator that a backend has, on anything that its checks let pass."""
    names = [name for name in MAKERS if backend in dispatch.TABLE[name]]
    name = draw(st.sampled_from(names))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    power = SCALES[dtype]
    special = draw(st.sampled_from([None, None, 0.0, math.inf, -math.inf, math.nan]))

    def tensor(*shape: int, plain: bool = False, score: bool = False) -> torch.Tensor:
        x = torch.randn(shape, generator=generator)
        if not plain:
            kind = draw(st.sampled_from(["noise", "noise", "zero", "constant", "far"]))
            scale = 2.0 ** draw(st.integers(-power, 0 if score else power))
            x = {
                "noise": x,
                "zero": 0 * x,
                "constant": 0 * x + 1.1,
                "far": x + (1 if score else 30),
            }[kind] * scale
            if special is not None and not score and x.numel():
                x.view(-1)[draw(st.integers(0, x.numel() - 1))] = special
        x = x.to(dtype)
        layout = draw(st.sampled_from(["contiguous", "contiguous", "channels_last", "sliced"]))
        if layout == "channels_last" and x.ndim == 4:
            return x.to(memory_format=torch.channels_last)
        if layout == "sliced" and x.ndim > 1:
            return torch.cat([x, x], -1)[..., : shape[-1]]
        return x

    def size(most: int, least: int = 1) -> int:
        return draw(st.integers(least, most))

    return MAKERS[name](tensor, size)


def _shared_skip(tensor: Any, size: Any) -> Call:
    timesteps, batch, groups, width = size(3), size(2), size(3), size(4)
    channels = groups * width
    first = size(channels)
    space = (size(4), size(5))
    hidden = tensor(timesteps * batch, first, *space)
    skip = tensor(batch, channels - first, *space)
    return Call(
        "shared_skip_group_norm_silu",
        {
            "hidden": hidden,
            "skip": skip,
            "weight": tensor(channels, plain=True),
            "bias": tensor(channels, plain=True),
        },
        lambda hidden, skip, weight, bias: functional.shared_skip_group_norm_silu(
            hidden, skip, groups, weight, bias
        ),
        (torch.cat([hidden, skip.repeat(timesteps, 1, 1, 1)], 1), groups, 1e-5),
    )


def _broadcast_add(tensor: Any, size: Any) -> Call:
    timesteps, batch, groups = size(3), size(2), size(3)
    channels = groups * size(4)
    space = (size(4), size(5))
    hidden = tensor(timesteps * batch, channels, *space)
    shared = tensor(batch, channels, *space)
    time_embedding = tensor(timesteps * batch, channels)
    added = hidden.float() + shared.float().repeat(timesteps, 1, 1, 1)
    return Call(
        "broadcast_add_group_norm_silu",
        {
            "hidden": hidden,
            "shared": shared,
            "time_embedding": time_embedding,
            "weight": tensor(channels, plain=True),
            "bias": tensor(channels, plain=True),
        },
        lambda hidden, shared, time_embedding, weight, bias: (
            functional.broadcast_add_group_norm_silu(
                hidden, shared, time_embedding, groups, weight, bias
            )
        ),
        (added + time_embedding.float()[..., None, None], groups, 1e-5),
    )


def _timestep_sum(tensor: Any, size: Any) -> Call:
    timesteps, batch, groups = size(3), size(2), size(3)
    channels = groups * size(4)
    hidden = tensor(timesteps * batch, channels, size(4), size(5))
    return Call(
        "timestep_sum_group_norm_silu",
        {
            "hidden": hidden,
            "weight": tensor(channels, plain=True),
            "bias": tensor(channels, plain=True),
        },
        lambda hidden, weight, bias: functional.timestep_sum_group_norm_silu(
            hidden, torch.linspace(-2, 1, timesteps, dtype=torch.float64), groups, weight, bias
        ),
        (hidden, groups, 1e-5),
    )


def _attention(tensor: Any, size: Any) -> Call:
    timesteps, batch, heads, width = size(3), size(2), size(2), 8 * size(3)
    keys = size(40)
    tensors = {
        # Finite, since torch takes a score of -inf for a mask, wherever it came from; and scores
        # of hundreds at most: a float32 logsumexp does not tell large ones apart (numerics.md).
        "query": tensor(timesteps * batch, size(20), heads * width, score=True),
        "key": tensor(batch, keys, heads * width, score=True),
        "value": tensor(batch, keys, heads * width),
    }
    masked = size(4) == 4
    if masked:
        bias = tensor(batch, 1, keys, plain=True)
        bias[0, 0, : size(keys)] = -math.inf
        tensors["bias"] = bias
    return Call(
        "cross_timestep_attention",
        tensors,
        lambda query, key, value, bias=None: functional.cross_timestep_attention(
            query, key, value, heads, attention_bias=bias
        ),
        heads=heads,
    )


def _geglu(tensor: Any, size: Any) -> Call:
    return Call("geglu", {"x": tensor(size(3), size(4), 2 * size(20))}, functional.geglu)


def _combine(tensor: Any, size: Any) -> Call:
    timesteps, shape = size(4), (size(2), 4, size(4), size(4))
    return Call(
        "one_pass_combine",
        {"latents": tensor(*shape), "noise_pred": tensor(timesteps, *shape)},
        lambda latents, noise_pred: functional.one_pass_combine(
            latents, noise_pred, 4.2, torch.linspace(-2, 1, timesteps, dtype=torch.float64)
        ),
    )


def _kl(tensor: Any, size: Any) -> Call:
    shape = (size(3), size(2), 4, size(5), size(5))
    return Call("noise_kl", {"noise_pred": tensor(*shape)}, functional.noise_kl)


def _modulated(tensor: Any, size: Any) -> Call:
    timesteps, batch, channels = size(3), size(2), size(20)
    x = tensor(batch, size(6), channels)
    return Call(
        "adaptive_layer_norm",
        {
            "x": x,
            "scale": tensor(timesteps * batch, channels, plain=True),
            "shift": tensor(timesteps * batch, channels, plain=True),
        },
        functional.adaptive_layer_norm,
        (x.flatten(0, 1), 1, 1e-6),
    )


def _gated(tensor: Any, size: Any) -> Call:
    timesteps, batch, tokens, channels = size(3), size(2), size(6), size(20)
    return Call(
        "gated_residual",
        {
            "x": tensor(batch, tokens, channels),
            "gate": tensor(timesteps * batch, channels, plain=True),
            "y": tensor(timesteps * batch, tokens, channels),
        },
        functional.gated_residual,
    )


def _long_skip(tensor: Any, size: Any) -> Call:
    timesteps, batch, tokens = size(3), size(2), size(6)
    channels, wide, outputs = size(20), size(20), size(20)
    hidden = tensor(timesteps * batch, tokens, channels)
    skip = tensor(batch, tokens, wide)
    tensors = {
        "hidden": hidden,
        "skip": skip,
        "norm_weight": tensor(channels + wide, plain=True),
        "norm_bias": tensor(channels + wide, plain=True),
        "weight": tensor(outputs, channels + wide, plain=True),
    }
    if size(4) < 4:
        tensors["bias"] = tensor(outputs, plain=True)
    joined = torch.cat([hidden, skip.repeat(timesteps, 1, 1)], -1).flatten(0, 1)
    scaled = (tensors["weight"] * tensors["norm_weight"]).float().abs()
    return Call(
        "shared_skip_layer_norm_linear",
        tensors,
        functional.shared_skip_layer_norm_linear,
        (joined, 1, 1e-6),
        gain=max(scaled.sum(0).max().item(), scaled.sum(1).max().item()),
    )


def _as_tokens(tensor: Any, size: Any) -> Call:
    groups = size(4)
    channels = groups * size(5)
    x = tensor(size(3), channels, size(6), size(6))
    return Call(
        "group_norm_tokens",
        {
            "x": x,
            "weight": tensor(channels, plain=True),
            "bias": tensor(channels, plain=True),
        },
        lambda x, weight, bias: functional.group_norm_tokens(x, groups, weight, bias),
        (x.float(), groups, 1e-6),
    )


MAKERS: dict[str, Callable[..., Call]] = {
    "shared_skip_group_norm_silu": _shared_skip,
    "broadcast_add_group_norm_silu": _broadcast_add,
    "timestep_sum_group_norm_silu": _timestep_sum,
    "cross_timestep_attention": _attention,
    "adaptive_layer_norm": _modulated,
    "gated_residual": _gated,
    "shared_skip_layer_norm_linear": _long_skip,
    "group_norm_tokens": _as_tokens,
    "geglu": _geglu,
    "one_pass_combine": _combine,
    "noise_kl": _kl,
}


def _terms(call: Call) -> float:
    """How large the terms of gradients are, where these may cancel to nothing.

    Attention's where its weights are even; a norm's where a group has two values, whose gradient is
    0 but for rounding.
    """
    if call.normed is not None and call.normed[0].numel():
        rstd = _finite(_moments(call)[1].rsqrt()).max(initial=0.0)
        weight = call.tensors.get("weight", torch.ones(1)).float().abs().max()
        return float(rstd * weight) * (call.gain or 1.0)
    if call.operator != "cross_timestep_attention":
        return 0.0
    query, key, value = (call.tensors[n].float().abs() for n in ("query", "key", "value"))
    largest = torch.nan_to_num(value, posinf=0.0).max()
    rows, tokens, _ = query.shape
    return rows * tokens * (largest * max(1.0, query.max().item(), key.max().item())).item()


def _kept_output(call: Call, name: str) -> float:
    """What attention's rounded output leaves in gradients of its scores, at most.

    They hold sum(grad * out) of a query, from the output as it is kept: half a last place of the
    largest value for each feature of a head. It is multiplied by a key, or by as many queries as
    the key's weights sum to.
    """
    if not call.heads or name not in ("grad of query", "grad of key", "grad of bias"):
        return 0.0
    x = {n: tensor.double() for n, tensor in call.tensors.items()}
    query, key = (x[n].unflatten(2, (call.heads, -1)).transpose(1, 2) for n in ("query", "key"))
    width = query.shape[-1]
    scores = query.unflatten(0, (-1, len(key))) @ key.mT / width**0.5  # (K, B, heads, N, M)
    if "bias" in x:
        scores = scores + x["bias"][:, None]
    weights = scores.softmax(-1).nan_to_num().sum((0, 3)).max()
    times = {
        "grad of query": key.abs().max() / width**0.5,
        "grad of key": weights * query.abs().max() / width**0.5,
        "grad of bias": weights * call.heads,
    }
    largest = _finite(x["value"].abs()).max(initial=0.0)
    half_a_place = torch.finfo(call.tensors["value"].dtype).eps / 2
    return float(half_a_place * largest * width * times[name])


def _rounded_terms(call: Call, name: str) -> float:
    """How large the terms of a product behind the norm are, at most, each of them rounded.

    What a product reads and gives is in the type of the call, and its sums may cancel: two normed
    values are 1 and -1, and their gradients 0 but for that.
    """
    if not call.gain or call.normed is None:
        return 0.0
    joined, *_ = call.normed
    largest = joined.shape[1] ** 0.5  # of a normed value
    if name.startswith("out"):
        return call.gain * largest
    if name in ("grad of hidden", "grad of skip"):
        return _terms(call) * largest
    weight, norm_weight = (call.tensors[n].float().abs() for n in ("weight", "norm_weight"))
    factor = max(1.0, norm_weight.max().item(), weight.sum(0).max().item())
    return len(joined) * largest * factor


def _moments(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance + epsilon of what is normed, by row and group."""
    assert call.normed is not None
    x, groups, epsilon = call.normed
    x = x.double().unflatten(1, (groups, -1)).flatten(2)
    return x.mean(-1), x.var(-1, correction=0) + epsilon


def _finite(x: torch.Tensor) -> Any:
    return x[x.isfinite()].numpy()


def _unsteadiness(call: Call) -> float:
    """How many times larger than a mean's own rounding it comes out of a norm.

    mean / sqrt(var + epsilon): a few for noise, thousands for a constant, of which float32 need not
    hold the mean exactly. torch's sum of it may, by luck.
    """
    if call.normed is None or not call.normed[0].numel():
        return 0.0
    mean, variance = _moments(call)
    return float(_finite(mean.abs() / variance.sqrt()).max(initial=0.0))


def faults(call: Call, backend: str) -> list[str]:
    """What a backend answers otherwise than the reference does.

    Finite values within twice the reference's own error against float64 and a rounding floor;
    infinities and NaN where the reference has some, and nowhere else.

    Returns:
        One line a fault.
    """
    got, by_torch, exact = call.on(backend), call.on("reference"), None
    try:
        exact = call.on("reference", torch.float64)
    except dispatch.BackendError:  # pragma: no cover
        return ["the reference takes no float64"]
    found, unsteady = [], _unsteadiness(call)
    slopes = [x[x.isfinite()].abs() for name, x in exact.items() if name.startswith("grad")]
    steepest = max((float(x.max()) for x in slopes if x.numel()), default=0.0)
    for name, value in got.items():
        rounded, answer = by_torch[name].double(), exact[name]
        value = value.double()
        if (value.shape, got[name].dtype) != (answer.shape, by_torch[name].dtype):
            found.append(f"{call.operator} {name}: {list(value.shape)} {got[name].dtype}")
            continue
        finite = rounded.isfinite() & answer.isfinite()
        if not torch.equal(value.isfinite() & answer.isfinite(), finite):
            count = int((value.isfinite() != rounded.isfinite()).sum())
            found.append(f"{call.operator} {name}: {count} values finite on one backend alone")
            continue
        if not finite.any():
            continue
        half = 4 * torch.finfo(got[name].dtype).eps
        single = FLOOR * torch.finfo(torch.float32).eps
        error = (value - answer)[finite].abs().max().item()
        # Sums over pixels or rows may cancel to nothing.
        terms = max(steepest, _terms(call)) if name.startswith("grad") else 0.0
        if name == "grad of bias" and call.normed is not None:
            terms = max(terms, 1.0)  # the gradients themselves, where all else is NaN
        allowed = 2 * (rounded - answer)[finite].abs().max().item()
        largest = answer[finite].abs().max().item()
        allowed += (half + single) * max(1e-30, largest) + single * terms
        allowed += _kept_output(call, name)
        allowed += torch.finfo(got[name].dtype).eps * _rounded_terms(call, name)
        # A mean's last place or two, times a normal weight; in gradients, times the terms that it
        # turns, which may cancel: two constants of which one is 1126.4 left 2.3 of terms of 840.
        times = terms if name.startswith("grad") else 4.0 * (call.gain or 1.0)
        allowed += 2 * torch.finfo(torch.float32).eps * unsteady * times
        if not error <= allowed:
            found.append(f"{call.operator} {name}: off by {error:.3g}, allowed {allowed:.3g}")
    return found
