"""linear(LayerNorm(concat(hidden, skip))) over K timesteps, the skip's half of both done once.

With m and r the mean and inverse deviation of a token over both halves, m_s the mean of its skip
alone, W' = weight * norm_weight and o = m_s - m:

    out = W'_h (hidden - m) r + r (W'_s (skip - m_s) + o W'_s 1) + weight norm_bias + bias

`W'_s (skip - m_s)` has B rows. Backward splits likewise: what the skip and its half of the weight
get is r times the gradient, summed over the timesteps first.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Tokens(NamedTuple):
    """What the products read, and the statistics.

    Attributes:
        own: [K*B, N, C], (hidden - m) r.
        shared: [B, N, D], skip - m_s.
        rstd: [K*B, N], r.
        offset: [K*B, N], m_s - m.
    """

    own: torch.Tensor
    shared: torch.Tensor
    rstd: torch.Tensor
    offset: torch.Tensor


def tokens_of(hidden: torch.Tensor, skip: torch.Tensor, eps: float) -> Tokens:
    """Normalise the hidden half, centre the skip."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    own, shared = hidden.to(dtype), skip.to(dtype)
    width = hidden.shape[-1] + skip.shape[-1]
    mean_shared = shared.mean(-1)  # (B, N)
    centred = shared - mean_shared.unsqueeze(-1)
    part = skip.shape[-1] / width
    mean = _each(mean_shared, hidden) * part + own.mean(-1) * (1 - part)  # (K*B, N)
    offset = _each(mean_shared, hidden) - mean
    own = own - mean.unsqueeze(-1)
    # sum (s - m)^2 = sum (s - m_s)^2 + D (m_s - m)^2, the first term once for all timesteps.
    spread = own.square().sum(-1) + _each(centred.square().sum(-1), hidden)
    rstd = torch.rsqrt((spread + skip.shape[-1] * offset.square()) / width + eps)
    own = own * rstd.unsqueeze(-1)
    return Tokens(own.to(hidden.dtype), centred.to(skip.dtype), rstd, offset)


def folded(norm_weight: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W' in the dtype of weight, and the same, as it is rounded, in that of the statistics."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scaled = (weight.to(dtype) * norm_weight.to(dtype)).to(weight.dtype)
    return scaled, scaled.to(dtype)


def constant_of(
    norm_bias: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """weight norm_bias + bias, [O], in the dtype of the statistics."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    out = weight.to(dtype) @ norm_bias.to(dtype)
    return out if bias is None else out + bias.to(dtype)


def shared_skip_layer_norm_linear_fwd(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    own, shared, rstd, offset = tokens_of(hidden, skip, eps)
    border = hidden.shape[-1]
    scaled, wide = folded(norm_weight, weight)
    from_skip = F.linear(shared, scaled[:, border:]).to(rstd.dtype)
    left = offset.unsqueeze(-1) * wide[:, border:].sum(1)
    out = F.linear(own, scaled[:, :border]).to(rstd.dtype) + constant_of(norm_bias, weight, bias)
    out = out + rstd.unsqueeze(-1) * (_each(from_skip, hidden) + left)
    return out.to(hidden.dtype)


def shared_skip_layer_norm_linear_bwd(
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    skip: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    own, shared, rstd, offset = tokens_of(hidden, skip, eps)
    border, batch, dtype = hidden.shape[-1], len(skip), rstd.dtype
    width = border + skip.shape[-1]
    scaled, wide = folded(norm_weight, weight)
    sums = wide[:, border:].sum(1)
    from_skip = F.linear(shared, scaled[:, border:]).to(dtype)
    grad, r = grad_out.to(dtype), rstd.unsqueeze(-1)
    weighted = _summed(r * grad, batch)  # (B, N, O)
    grad_own = (grad_out @ scaled[:, :border]).to(dtype)
    grad_shared = (weighted.to(skip.dtype) @ scaled[:, border:]).to(dtype)
    # Of a norm's gradient: the means of the gradient and of its product with the normed tokens.
    through = grad @ sums  # (K*B, N)
    level = (grad_own.sum(-1) + through) / width
    along = (grad * _each(from_skip, hidden)).sum(-1) + offset * through
    along = ((grad_own * own.to(dtype)).sum(-1) + rstd * along) / width
    grad_hidden = r * (grad_own - level.unsqueeze(-1) - own.to(dtype) * along.unsqueeze(-1))
    squares = rstd.square() * along
    grad_skip = grad_shared - shared.to(dtype) * _summed(squares, batch).unsqueeze(-1)
    grad_skip = grad_skip - _summed(rstd * level + squares * offset, batch).unsqueeze(-1)
    grads = weight_gradients(
        grad_out, weighted, Tokens(own, shared, rstd, offset), norm_weight, norm_bias, weight
    )
    return grad_hidden.to(hidden.dtype), grad_skip.to(skip.dtype), *grads


def weight_gradients(
    grad_out: torch.Tensor,
    weighted: torch.Tensor,
    tokens: Tokens,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the norm's weight and bias, of weight and of bias.

    Args:
        grad_out: [K*B, N, O].
        weighted: [B, N, O], r times it, summed over the timesteps.
        tokens: Of `tokens_of`.
        norm_weight: [C + D].
        norm_bias: [C + D].
        weight: [O, C + D].
    """
    dtype = tokens.rstd.dtype
    columns = grad_out.flatten(0, 1).t()  # (O, K*B*N)
    factors = torch.stack([tokens.rstd * tokens.offset, torch.ones_like(tokens.rstd)], dim=-1)
    left, total = (columns.to(dtype) @ factors.flatten(0, 1)).unbind(1)  # (O,) each
    of_own = (columns @ tokens.own.flatten(0, 1)).to(dtype)
    of_skip = weighted.flatten(0, 1).t().to(tokens.shared.dtype) @ tokens.shared.flatten(0, 1)
    scaled = torch.cat([of_own, of_skip.to(dtype) + left.unsqueeze(1)], dim=1)
    wide = weight.to(dtype)
    grad_weight = scaled * norm_weight.to(dtype) + total.unsqueeze(1) * norm_bias.to(dtype)
    return (
        (scaled * wide).sum(0).to(norm_weight.dtype),
        (total @ wide).to(norm_bias.dtype),
        grad_weight.to(weight.dtype),
        total.to(weight.dtype, copy=True),  # a tensor of its own
    )


def _each(rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """[B, ...] as [K*B, ...]."""
    timesteps = len(hidden) // max(len(rows), 1)
    return rows.expand(timesteps, *rows.shape).flatten(0, 1)


def _summed(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """[K*B, ...] summed over the timesteps to [B, ...]."""
    return rows.unflatten(0, (len(rows) // max(batch, 1), batch)).sum(0)
