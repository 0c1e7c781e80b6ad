"""LayerNorm(x) * (1 + scale) + shift over K timesteps in Triton, the tokens normalised once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tiue_kernels.reference.adaptive_layer_norm import timesteps_of
from tiue_kernels.triton.launch import bound, on_device_of, power_of_two

# Of the modulation's gradients: channels and tokens that a program sums at a time.
BLOCK_C, BLOCK_N = 64, 32


# One program normalises one token, which it holds whole in float32, and writes it for every
# timestep with that timestep's scale and shift. `plane`, the elements of x, may be beyond int32.
@triton.jit
def _forward_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    stats_ptr,
    plane,
    timesteps,
    tokens,
    n_tokens,
    channels,
    eps,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs, row = tl.arange(0, BLOCK), token // tokens
    mask = offs < channels
    x = tl.load(x_ptr + token * channels + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / channels
    centred = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / channels + eps)
    tl.store(stats_ptr + token, mean)
    tl.store(stats_ptr + n_tokens + token, rstd)
    normed = centred * rstd
    modulation = row * channels + offs
    for _ in range(bound(timesteps)):
        scale = tl.load(scale_ptr + modulation, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + modulation, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * channels + offs, normed * (1.0 + scale) + shift, mask=mask)
        modulation += n_tokens // tokens * channels
        out_ptr += plane


# One program computes the gradient of one token, summed over the timesteps that read it.
@triton.jit
def _token_grad_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    stats_ptr,
    grad_x_ptr,
    plane,
    timesteps,
    tokens,
    n_tokens,
    channels,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs, row = tl.arange(0, BLOCK), token // tokens
    mask = offs < channels
    x = tl.load(x_ptr + token * channels + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(stats_ptr + token)
    rstd = tl.load(stats_ptr + n_tokens + token)
    normed = tl.where(mask, (x - mean) * rstd, 0.0)
    slope = tl.zeros([BLOCK], dtype=tl.float32)
    modulation = row * channels + offs
    for _ in range(bound(timesteps)):
        grad = tl.load(grad_ptr + token * channels + offs, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + modulation, mask=mask, other=0.0).to(tl.float32)
        slope += grad * (1.0 + scale)
        modulation += n_tokens // tokens * channels
        grad_ptr += plane
    level = tl.sum(slope, axis=0) / channels
    along = tl.sum(slope * normed, axis=0) / channels
    grad_x = rstd * (slope - level - normed * along)
    tl.store(grad_x_ptr + token * channels + offs, grad_x, mask=mask)


# One program sums a block of channels over all tokens of one row, in their order.
@triton.jit
def _modulation_grad_kernel(
    grad_ptr,
    x_ptr,
    stats_ptr,
    grad_scale_ptr,
    grad_shift_ptr,
    tokens,
    n_tokens,
    channels,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    shared = row % (n_tokens // tokens) * tokens  # the first token of the row that it reads
    of_scale = tl.zeros([BLOCK_C], dtype=tl.float32)
    of_shift = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, bound(tokens), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < tokens
        mask = mask_n[:, None] & (offs_c < channels)[None, :]
        offs = (row * tokens + offs_n)[:, None] * channels + offs_c[None, :]
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        offs = (shared + offs_n)[:, None] * channels + offs_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + shared + offs_n, mask=mask_n, other=0.0)
        rstd = tl.load(stats_ptr + n_tokens + shared + offs_n, mask=mask_n, other=0.0)
        of_scale += tl.sum(grad * (x - mean[:, None]) * rstd[:, None], axis=0)
        of_shift += tl.sum(grad, axis=0)
    mask_c = offs_c < channels
    tl.store(grad_scale_ptr + row * channels + offs_c, of_scale, mask=mask_c)
    tl.store(grad_shift_ptr + row * channels + offs_c, of_shift, mask=mask_c)


def adaptive_layer_norm_fwd(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, (batch, tokens, channels) = scale.shape[0], x.shape
    out = torch.empty((rows, tokens, channels), dtype=x.dtype, device=x.device)
    stats = torch.empty((2, batch, tokens), dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device_of(x):
            _forward_kernel[(batch * tokens,)](
                *(x.contiguous(), scale.contiguous(), shift.contiguous(), out, stats, x.numel()),
                *(timesteps_of(scale, x), tokens, batch * tokens, channels, eps),
                BLOCK=power_of_two(channels),
            )
    return out, stats


def adaptive_layer_norm_bwd(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, channels = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_scale = torch.empty(scale.shape, dtype=scale.dtype, device=x.device)
    grad_shift = torch.empty(shift.shape, dtype=shift.dtype, device=x.device)
    if not x.numel():
        return grad_x, grad_scale.zero_(), grad_shift.zero_()
    grad_out, x = grad_out.contiguous(), x.contiguous()
    with on_device_of(x):
        _token_grad_kernel[(batch * tokens,)](
            *(grad_out, x, scale.contiguous(), stats, grad_x, x.numel()),
            *(timesteps_of(scale, x), tokens, batch * tokens, channels),
            BLOCK=power_of_two(channels),
        )
        _modulation_grad_kernel[(len(scale) * triton.cdiv(channels, BLOCK_C),)](
            *(grad_out, x, stats, grad_scale, grad_shift),
            *(tokens, batch * tokens, channels),
            BLOCK_C=BLOCK_C,
            BLOCK_N=BLOCK_N,
        )
    return grad_x, grad_scale, grad_shift
