"""The forward operators in torch's own, for programs that leave this package.

    program = torch.export.export(module, args).run_decompositions(decompositions.table())

Such a program needs torch alone where it is loaded, and other runtimes (OpenVINO) can convert it.
Nothing in the forms below depends on the sizes of a map, so one program may serve every size; none
writes in place, which a decomposition must not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tiue_kernels import ops
from tiue_kernels.ops._library import COMPOSED
from tiue_kernels.reference.geglu import geglu_fwd
from tiue_kernels.reference.group_norm import arithmetic_type
from tiue_kernels.reference.noise_kl import noise_kl_fwd
from tiue_kernels.reference.one_pass_combine import one_pass_combine_fwd


def table() -> dict[Any, Callable[..., Any]]:
    """Every forward operator `tiue::<op>_fwd` to a function of torch's operators.

    The logsumexp of attention and the statistics of norms are given too, though an exported
    program drops what nothing reads.
    """
    return {
        **{op: run for op, run in COMPOSED.items() if str(op).endswith("_fwd.default")},
        ops.geglu.forward: geglu_fwd,
        ops.noise_kl.forward: noise_kl_fwd,
        ops.one_pass_combine.forward: one_pass_combine_fwd,
        ops.shared_skip_group_norm_silu.forward: _shared_skip_norm,
        ops.broadcast_add_group_norm_silu.forward: _broadcast_add_norm,
        ops.timestep_sum_group_norm_silu.forward: _timestep_sum_norm,
        ops.cross_timestep_attention.forward: _attention,
        ops.geglu_feed_forward.forward: _feed_forward,
        ops.upsample_conv2d.forward: _upsample,
    }


def _group_norm(
    x: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """GroupNorm(x) and the statistics, x in its arithmetic type."""
    rows, channels, height, width = x.shape
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    out, mean, rstd = torch.native_group_norm(
        x.contiguous(), weight, bias, rows, channels, height * width, num_groups, eps
    )
    return out, torch.stack([mean, rstd])


def _shared_skip_norm(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    group_size = weight.shape[0] // num_groups
    groups = -(-hidden.shape[1] // group_size)  # those with a hidden channel in them
    border = groups * group_size
    straddling = border - hidden.shape[1]
    dtype = arithmetic_type(hidden)
    front, back = hidden, skip[:, straddling:]
    if straddling:
        timesteps = hidden.shape[0] // skip.shape[0]
        front = torch.cat([hidden, skip[:, :straddling].repeat(timesteps, 1, 1, 1)], dim=1)
    out, stats = _group_norm(front.to(dtype), groups, weight[:border], bias[:border], eps)
    out = F.silu(out).to(hidden.dtype)
    if groups == num_groups:
        return out, back.contiguous(), stats, stats.new_empty(2, skip.shape[0], 0)
    shared, shared_stats = _group_norm(
        back.to(dtype), num_groups - groups, weight[border:], bias[border:], eps
    )
    return out, F.silu(shared).to(hidden.dtype), stats, shared_stats


def _broadcast_add_norm(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = arithmetic_type(shared)
    embedding = time_embedding.to(dtype)[:, :, None, None]
    rows = shared.to(dtype).repeat(time_embedding.shape[0] // shared.shape[0], 1, 1, 1)
    rows = rows if hidden is None else rows + hidden.to(dtype)
    if scale_shift:
        out, stats = _group_norm(rows, num_groups, weight, bias, eps)
        scale, shift = embedding.chunk(2, dim=1)
        out = out * (1 + scale) + shift
    else:
        out, stats = _group_norm(rows + embedding, num_groups, weight, bias, eps)
    return F.silu(out).to(shared.dtype), stats


def _timestep_sum_norm(
    hidden: torch.Tensor,
    coefficients: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = arithmetic_type(hidden)
    out, stats = _group_norm(hidden.to(dtype), num_groups, weight, bias, eps)
    timesteps = coefficients.shape[0]
    rows = F.silu(out).unflatten(0, (timesteps, hidden.shape[0] // timesteps))
    total = (coefficients.to(dtype)[:, None, None, None, None] * rows).sum(0)
    return total.to(hidden.dtype), stats


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float,
    attention_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tokens, channels = query.shape
    shared = key.shape[0]
    # (K*B, N, C) -> (B, heads, K*N, head size): the timesteps join the query axis.
    query = query.reshape(-1, shared, tokens, num_heads, channels // num_heads)
    query = query.permute(1, 3, 0, 2, 4).flatten(2, 3)
    key, value = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (key, value))
    bias = None if attention_bias is None else attention_bias[:, None].to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    out = out.unflatten(2, (-1, tokens)).permute(2, 0, 3, 1, 4).reshape(rows, tokens, channels)

    scores = query @ key.mT * scale
    scores = scores if bias is None else scores + bias
    logsumexp = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
    logsumexp = logsumexp.unflatten(2, (-1, tokens)).permute(2, 0, 1, 3)  # (K, B, heads, N)
    return out, logsumexp.reshape(rows, num_heads, tokens)


def _feed_forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    keep_projection: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, mean, rstd = x, x.new_empty(0), x.new_empty(0)
    if norm_weight is not None and norm_bias is not None:
        norm = (norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
        tokens, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *norm)
    projection = F.linear(tokens.to(weight.dtype), projection_weight, projection_bias)
    hidden, gate = projection.chunk(2, dim=-1)
    out = F.linear(hidden * F.gelu(gate), weight, bias)
    return out, projection if keep_projection else weight.new_empty(0), mean, rstd


def _upsample(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
