"""x + gate * y over K timesteps in Triton, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tiue_kernels.reference.adaptive_layer_norm import timesteps_of
from tiue_kernels.triton.launch import bound, on_device_of, power_of_two

# Of the gate's gradient: channels and tokens that a program sums at a time.
BLOCK_C, BLOCK_N = 64, 32


# One program reads one token of x, once, and writes it for every timestep with that timestep's
# gated branch, in float32.
@triton.jit
def _forward_kernel(
    x_ptr, gate_ptr, y_ptr, out_ptr, timesteps, tokens, n_tokens, channels, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < channels
    x = tl.load(x_ptr + token * channels + offs, mask=mask, other=0.0).to(tl.float32)
    modulation = token // tokens * channels + offs
    offs += token * channels
    for _ in range(bound(timesteps)):
        gate = tl.load(gate_ptr + modulation, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, x + gate * y, mask=mask)
        modulation += n_tokens // tokens * channels
        offs += n_tokens * channels


# One program computes the gradients of one token of x, summed over the timesteps, and of what they
# add to it.
@triton.jit
def _token_grad_kernel(
    grad_ptr,
    gate_ptr,
    grad_x_ptr,
    grad_y_ptr,
    timesteps,
    tokens,
    n_tokens,
    channels,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK)
    mask = offs_c < channels
    modulation = token // tokens * channels + offs_c
    offs = token * channels + offs_c
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(bound(timesteps)):
        gate = tl.load(gate_ptr + modulation, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_y_ptr + offs, grad * gate, mask=mask)
        total += grad
        modulation += n_tokens // tokens * channels
        offs += n_tokens * channels
    tl.store(grad_x_ptr + token * channels + offs_c, total, mask=mask)


# One program sums a block of channels over all tokens of one row, in their order.
@triton.jit
def _gate_grad_kernel(
    grad_ptr,
    y_ptr,
    grad_gate_ptr,
    tokens,
    channels,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, bound(tokens), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < tokens)[:, None] & mask_c[None, :]
        offs = (row * tokens + offs_n)[:, None] * channels + offs_c[None, :]
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(grad * y, axis=0)
    tl.store(grad_gate_ptr + row * channels + offs_c, total, mask=mask_c)


def gated_residual_fwd(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    batch, tokens, channels = x.shape
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if out.numel():
        with on_device_of(x):
            _forward_kernel[(batch * tokens,)](
                *(x.contiguous(), gate.contiguous(), y.contiguous(), out),
                *(timesteps_of(gate, x), tokens, batch * tokens, channels),
                BLOCK=power_of_two(channels),
            )
    return out


def gated_residual_bwd(
    grad_out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, channels = x.shape
    grad_x, grad_gate, grad_y = (
        torch.empty(own.shape, dtype=own.dtype, device=own.device) for own in (x, gate, y)
    )
    if not y.numel():
        return grad_x, grad_gate.zero_(), grad_y
    grad_out = grad_out.contiguous()
    with on_device_of(x):
        _token_grad_kernel[(batch * tokens,)](
            *(grad_out, gate.contiguous(), grad_x, grad_y),
            *(timesteps_of(gate, x), tokens, batch * tokens, channels),
            BLOCK=power_of_two(channels),
        )
        _gate_grad_kernel[(len(gate) * triton.cdiv(channels, BLOCK_C),)](
            *(grad_out, y.contiguous(), grad_gate, tokens, channels),
            BLOCK_C=BLOCK_C,
            BLOCK_N=BLOCK_N,
        )
    return grad_x, grad_gate, grad_y
