"""What the kernels are held against: plain PyTorch in the same dtype, and in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from testing.tolerances import ROUNDING_FLOORS

Tensors = tuple[torch.Tensor, ...]


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def repeat(shared: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    timesteps = rows.shape[0] // max(shared.shape[0], 1)
    return shared.repeat(timesteps, *[1] * (shared.ndim - 1))


def plain_norm(hidden, skip, weight, bias, num_groups: int) -> Tensors:
    """SiLU(GroupNorm(concat(hidden, repeated skip))), cut where the skip's own groups begin."""
    joined = torch.cat([hidden, repeat(skip, hidden)], 1)
    size = joined.shape[1] // num_groups
    border = -(-hidden.shape[1] // size) * size
    if not len(joined):
        return joined[:, :border], joined[:, border:]
    dtype = torch.promote_types(joined.dtype, weight.dtype)  # F.group_norm takes one dtype
    out = F.group_norm(joined.to(dtype), num_groups, weight.to(dtype), bias.to(dtype), 1e-5)
    out = F.silu(out.to(joined.dtype))
    return out[:, :border], out[: len(skip), border:]


def plain_attention(query, key, value, bias, num_heads: int, scale: float) -> Tensors:
    def heads(x):
        return repeat(x, query).unflatten(2, (num_heads, -1)).transpose(1, 2)

    mask = None if bias is None else repeat(bias, query)[:, None]
    q = query.unflatten(2, (num_heads, -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, heads(key), heads(value), attn_mask=mask, scale=scale)
    return (out.transpose(1, 2).flatten(2),)


def outputs_and_gradients(
    function: Callable[..., Tensors], tensors: Sequence[torch.Tensor], grads: Tensors
) -> Tensors:
    """What autograd makes of a function, with these gradients of its outputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = function(*inputs)
    grads = tuple(g.to(o.dtype) for g, o in zip(grads, outputs, strict=True))
    # An empty batch reaches no weight: their gradients are zeros.
    return (*outputs, *torch.autograd.grad(outputs, inputs, grads, materialize_grads=True))


def check(
    names: Sequence[str],
    results: Sequence[torch.Tensor],
    function: Callable[..., Tensors],
    tensors: Sequence[torch.Tensor],
    grads: Tensors,
    dtype: torch.dtype,
    exact_function: Callable[..., Tensors] | None = None,
    magnitudes: Mapping[str, float] | None = None,
    floors: Mapping[torch.dtype, float] = ROUNDING_FLOORS,
) -> None:
    """error(kernel) <= 2 x error(plain torch in the same dtype) + rounding floor, by name.

    `magnitudes` gives, by name, the size of the terms of sums that may cancel.
    """
    plain = outputs_and_gradients(function, tensors, grads)
    doubles = [tensor.double() for tensor in tensors]
    exact = outputs_and_gradients(exact_function or function, doubles, grads)
    for name, value, naive, reference in zip(names, results, plain, exact, strict=True):
        assert value.shape == reference.shape, name
        assert value.dtype == naive.dtype, name
        if not value.numel():
            continue
        magnitude = max(reference.abs().max().item(), (magnitudes or {}).get(name, 0.0))
        floor = floors[dtype] * magnitude
        error = (value.double() - reference).abs().max().item()
        allowed = 2 * (naive.double() - reference).abs().max().item() + floor
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"
