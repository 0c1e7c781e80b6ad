"""KL(N(mu, var) || N(0, 1)) of each noise map in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tiue_kernels.reference.noise_kl import LEAST_VARIANCE
from tiue_kernels.triton.launch import bound, on_device_of, power_of_two

LEAST = tl.constexpr(LEAST_VARIANCE)
LARGEST_BLOCK = 8192  # 32 values a thread of 8 warps; a map of 4 x 64 x 64 is read in two blocks


# One program walks one map twice, the second time from L2: mean, then centred squares, float32.
@triton.jit
def _forward_kernel(x_ptr, kl_ptr, moments_ptr, n_maps, n_values, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * n_values
    offs = tl.arange(0, BLOCK)
    # The first value is near the mean: sums of differences keep their digits at a mean of 100.
    pivot = tl.load(x_ptr).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, bound(n_values), BLOCK):
        mask = start + offs < n_values
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, x - pivot, 0.0)
    mean = pivot + tl.sum(total, axis=0) / n_values
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, bound(n_values), BLOCK):
        mask = start + offs < n_values
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean, 0.0)
        squares += centred * centred
    variance = tl.sum(squares, axis=0) / (n_values - 1)
    log = tl.log(tl.maximum(variance, LEAST))
    tl.store(kl_ptr + row, 0.5 * (mean * mean + variance - 1.0 - log))
    tl.store(moments_ptr + row, mean)
    tl.store(moments_ptr + n_maps + row, variance)


# One program computes one block of one map's gradient: d mean / d x = 1 / n and
# d var / d x = 2 (x - mean) / (n - 1).
@triton.jit
def _backward_kernel(
    grad_kl_ptr, x_ptr, moments_ptr, grad_x_ptr, n_maps, n_values, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(n_values, BLOCK)
    row = tl.program_id(0) // blocks
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_values
    offs += row.to(tl.int64) * n_values
    mean = tl.load(moments_ptr + row)
    variance = tl.load(moments_ptr + n_maps + row)
    grad = tl.load(grad_kl_ptr + row).to(tl.float32)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    of_log = tl.where(variance >= LEAST, 1.0 / tl.maximum(variance, LEAST), 0.0)
    slope = mean / n_values + (x - mean) * (1.0 - of_log) / (n_values - 1)
    tl.store(grad_x_ptr + offs, grad * slope, mask=mask)


def noise_kl_fwd(noise_pred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape, n_values = noise_pred.shape[:-3], noise_pred.shape[-3:].numel()
    kl = torch.empty(shape, dtype=torch.float32, device=noise_pred.device)
    moments = torch.empty((2, *shape), dtype=torch.float32, device=noise_pred.device)
    if kl.numel():
        block = min(power_of_two(n_values), LARGEST_BLOCK)
        with on_device_of(noise_pred):
            _forward_kernel[(kl.numel(),)](
                noise_pred.contiguous(), kl, moments, kl.numel(), n_values, block, num_warps=8
            )
    return kl, moments


def noise_kl_bwd(
    grad_kl: torch.Tensor, noise_pred: torch.Tensor, moments: torch.Tensor
) -> torch.Tensor:
    n_maps, n_values = grad_kl.numel(), noise_pred.shape[-3:].numel()
    grad = torch.empty(noise_pred.shape, dtype=noise_pred.dtype, device=noise_pred.device)
    if grad.numel():
        block = min(power_of_two(n_values), 1024)
        with on_device_of(noise_pred):
            _backward_kernel[(n_maps * triton.cdiv(n_values, block),)](
                grad_kl.contiguous(),
                noise_pred.contiguous(),
                moments.contiguous(),
                grad,
                n_maps,
                n_values,
                block,
            )
    return grad
