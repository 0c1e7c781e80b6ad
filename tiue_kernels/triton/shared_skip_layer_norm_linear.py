"""linear(LayerNorm(concat(hidden, skip))) over K timesteps: what is around its products, in Triton.

The products are torch's; the algebra is that of `tiue_kernels.reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tiue_kernels.reference.shared_skip_layer_norm_linear import (
    Tokens,
    constant_of,
    folded,
    weight_gradients,
)
from tiue_kernels.triton.launch import bound, on_device_of, power_of_two


# One program centres the skip of one shared token and normalises the hidden half of every timestep
# that reads it, each held whole in float32.
@triton.jit
def _tokens_kernel(
    hidden_ptr,
    skip_ptr,
    own_ptr,
    shared_ptr,
    rstd_ptr,
    offset_ptr,
    timesteps,
    n_tokens,
    channels,
    skip_channels,
    eps,
    BLOCK: tl.constexpr,
    BLOCK_SKIP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    width = channels + skip_channels
    offs_s = tl.arange(0, BLOCK_SKIP)
    mask_s = offs_s < skip_channels
    offs_s += token * skip_channels
    skip = tl.load(skip_ptr + offs_s, mask=mask_s, other=0.0).to(tl.float32)
    mean_shared = tl.sum(skip, axis=0) / skip_channels
    centred = tl.where(mask_s, skip - mean_shared, 0.0)
    tl.store(shared_ptr + offs_s, centred, mask=mask_s)
    spread_shared = tl.sum(centred * centred, axis=0)
    offs = tl.arange(0, BLOCK)
    mask = offs < channels
    for _ in range(bound(timesteps)):
        place = token * channels + offs
        hidden = tl.load(hidden_ptr + place, mask=mask, other=0.0).to(tl.float32)
        mean_own = tl.sum(hidden, axis=0) / channels
        # m_s - m, formed of the difference of the halves' means.
        offset = (mean_shared - mean_own) * channels / width
        own = tl.where(mask, hidden - (mean_shared - offset), 0.0)
        spread = tl.sum(own * own, axis=0) + spread_shared + skip_channels * offset * offset
        rstd = tl.rsqrt(spread / width + eps)
        tl.store(own_ptr + place, own * rstd, mask=mask)
        tl.store(rstd_ptr + token, rstd)
        tl.store(offset_ptr + token, offset)
        token += n_tokens


# One program reads the skip's product of one shared token, once, and adds it to that of every
# timestep.
@triton.jit
def _join_kernel(
    from_own_ptr,
    from_skip_ptr,
    sums_ptr,
    constant_ptr,
    rstd_ptr,
    offset_ptr,
    out_ptr,
    timesteps,
    n_tokens,
    channels,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < channels
    place = token * channels + offs
    from_skip = tl.load(from_skip_ptr + place, mask=mask, other=0.0).to(tl.float32)
    sums = tl.load(sums_ptr + offs, mask=mask, other=0.0)
    constant = tl.load(constant_ptr + offs, mask=mask, other=0.0)
    for _ in range(bound(timesteps)):
        rstd, offset = tl.load(rstd_ptr + token), tl.load(offset_ptr + token)
        place = token * channels + offs
        own = tl.load(from_own_ptr + place, mask=mask, other=0.0).to(tl.float32)
        out = own + constant + rstd * (from_skip + offset * sums)
        tl.store(out_ptr + place, out, mask=mask)
        token += n_tokens


# One program reads the output's gradient at one shared token: summed over the timesteps with their
# weights, and for each of them its products with the sums of the weight and with what the skip
# gave.
@triton.jit
def _output_grad_kernel(
    grad_ptr,
    from_skip_ptr,
    sums_ptr,
    rstd_ptr,
    offset_ptr,
    weighted_ptr,
    through_ptr,
    along_ptr,
    timesteps,
    n_tokens,
    channels,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first = token * channels
    offs = tl.arange(0, BLOCK)
    mask = offs < channels
    from_skip = tl.load(from_skip_ptr + first + offs, mask=mask, other=0.0).to(tl.float32)
    sums = tl.load(sums_ptr + offs, mask=mask, other=0.0)
    weighted = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(bound(timesteps)):
        rstd, offset = tl.load(rstd_ptr + token), tl.load(offset_ptr + token)
        place = token * channels + offs
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        weighted += rstd * grad
        through = tl.sum(grad * sums, axis=0)
        tl.store(through_ptr + token, through)
        tl.store(along_ptr + token, rstd * (tl.sum(grad * from_skip, axis=0) + offset * through))
        token += n_tokens
    tl.store(weighted_ptr + first + offs, weighted, mask=mask)


# One program turns the gradients at the normalised tokens into those of the hidden half of every
# timestep, and of the one skip that they share.
@triton.jit
def _token_grad_kernel(
    grad_own_ptr,
    grad_shared_ptr,
    own_ptr,
    shared_ptr,
    rstd_ptr,
    offset_ptr,
    through_ptr,
    along_ptr,
    grad_hidden_ptr,
    grad_skip_ptr,
    timesteps,
    n_tokens,
    channels,
    skip_channels,
    BLOCK: tl.constexpr,
    BLOCK_SKIP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    first = token * skip_channels
    width = channels + skip_channels
    offs = tl.arange(0, BLOCK)
    mask = offs < channels
    slope, level_sum = 0.0, 0.0
    for _ in range(bound(timesteps)):
        rstd, offset = tl.load(rstd_ptr + token), tl.load(offset_ptr + token)
        place = token * channels + offs
        grad = tl.load(grad_own_ptr + place, mask=mask, other=0.0).to(tl.float32)
        own = tl.load(own_ptr + place, mask=mask, other=0.0).to(tl.float32)
        level = (tl.sum(grad, axis=0) + tl.load(through_ptr + token)) / width
        along = (tl.sum(grad * own, axis=0) + tl.load(along_ptr + token)) / width
        tl.store(grad_hidden_ptr + place, rstd * (grad - level - own * along), mask=mask)
        slope += rstd * rstd * along
        level_sum += rstd * level + rstd * rstd * along * offset
        token += n_tokens
    offs_s = tl.arange(0, BLOCK_SKIP)
    mask_s = offs_s < skip_channels
    offs_s += first
    grad = tl.load(grad_shared_ptr + offs_s, mask=mask_s, other=0.0).to(tl.float32)
    shared = tl.load(shared_ptr + offs_s, mask=mask_s, other=0.0).to(tl.float32)
    tl.store(grad_skip_ptr + offs_s, grad - shared * slope - level_sum, mask=mask_s)


def _sizes(hidden: torch.Tensor, skip: torch.Tensor) -> tuple[int, int]:
    """Timesteps and shared tokens."""
    return len(hidden) // max(len(skip), 1), skip.shape[0] * skip.shape[1]


def _tokens(hidden: torch.Tensor, skip: torch.Tensor, eps: float) -> Tokens:
    timesteps, n_tokens = _sizes(hidden, skip)
    hidden, skip = hidden.contiguous(), skip.contiguous()
    own, shared = torch.empty_like(hidden), torch.empty_like(skip)
    rstd, offset = (
        torch.empty(hidden.shape[:2], dtype=torch.float32, device=hidden.device) for _ in range(2)
    )
    if hidden.numel():
        channels, skip_channels = hidden.shape[-1], skip.shape[-1]
        with on_device_of(hidden):
            _tokens_kernel[(n_tokens,)](
                *(hidden, skip, own, shared, rstd, offset),
                *(timesteps, n_tokens, channels, skip_channels, eps),
                BLOCK=power_of_two(channels),
                BLOCK_SKIP=power_of_two(skip_channels),
            )
    return Tokens(own, shared, rstd, offset)


def shared_skip_layer_norm_linear_fwd(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    timesteps, n_tokens = _sizes(hidden, skip)
    tokens, border = _tokens(hidden, skip, eps), hidden.shape[-1]
    scaled, wide = folded(norm_weight, weight)
    channels = len(weight)
    out = torch.empty((*hidden.shape[:2], channels), dtype=hidden.dtype, device=hidden.device)
    if out.numel():
        with on_device_of(hidden):
            _join_kernel[(n_tokens,)](
                F.linear(tokens.own, scaled[:, :border]),
                F.linear(tokens.shared, scaled[:, border:]),
                wide[:, border:].sum(1),
                constant_of(norm_bias, weight, bias),
                *(tokens.rstd, tokens.offset, out, timesteps, n_tokens, channels),
                BLOCK=power_of_two(channels),
            )
    return out


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
    timesteps, n_tokens = _sizes(hidden, skip)
    grad_out, border, channels = grad_out.contiguous(), hidden.shape[-1], len(weight)
    tokens = _tokens(hidden, skip, eps)
    scaled, wide = folded(norm_weight, weight)
    grad_hidden, grad_skip = torch.empty_like(tokens.own), torch.empty_like(tokens.shared)
    weighted = torch.empty((*skip.shape[:2], channels), dtype=torch.float32, device=skip.device)
    if grad_out.numel():
        through, along = torch.empty_like(tokens.rstd), torch.empty_like(tokens.rstd)
        with on_device_of(hidden):
            _output_grad_kernel[(n_tokens,)](
                *(grad_out, F.linear(tokens.shared, scaled[:, border:])),
                *(wide[:, border:].sum(1), tokens.rstd, tokens.offset),
                *(weighted, through, along, timesteps, n_tokens, channels),
                BLOCK=power_of_two(channels),
            )
            _token_grad_kernel[(n_tokens,)](
                grad_out @ scaled[:, :border],
                weighted.to(skip.dtype) @ scaled[:, border:],
                *(tokens.own, tokens.shared, tokens.rstd, tokens.offset, through, along),
                *(grad_hidden, grad_skip, timesteps, n_tokens, border, skip.shape[-1]),
                BLOCK=power_of_two(border),
                BLOCK_SKIP=power_of_two(skip.shape[-1]),
            )
    grads = weight_gradients(grad_out, weighted, tokens, norm_weight, norm_bias, weight)
    return grad_hidden, grad_skip, *grads
