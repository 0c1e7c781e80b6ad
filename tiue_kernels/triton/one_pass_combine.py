"""S z + sum_k E_k eps_k in Triton: the K scheduler steps in one linear map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tiue_kernels.triton.launch import bound, on_device_of

BLOCK = 1024


# One program sums one block of elements over K in float32.
@triton.jit
def _forward_kernel(
    latents_ptr,
    noise_ptr,
    coefficients_ptr,
    out_ptr,
    latent_coefficient,
    timesteps,
    n_elements,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    total = latent_coefficient * tl.load(latents_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for k in range(bound(timesteps)):
        noise = tl.load(noise_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(coefficients_ptr + k).to(tl.float32) * noise
        noise_ptr += n_elements
    tl.store(out_ptr + offs, total, mask=mask)


# One program scales one block of the gradient for the latents and every k, and writes its part of
# the coefficients' gradients, float32, to partial [blocks, K].
@triton.jit
def _backward_kernel(
    grad_ptr,
    noise_ptr,
    coefficients_ptr,
    grad_latents_ptr,
    grad_noise_ptr,
    partial_ptr,
    latent_coefficient,
    timesteps,
    n_elements,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_latents_ptr + offs, latent_coefficient * grad, mask=mask)
    for k in range(bound(timesteps)):
        noise = tl.load(noise_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        coefficient = tl.load(coefficients_ptr + k).to(tl.float32)
        tl.store(grad_noise_ptr + offs, coefficient * grad, mask=mask)
        tl.store(partial_ptr + tl.program_id(0) * timesteps + k, tl.sum(noise * grad, axis=0))
        noise_ptr += n_elements
        grad_noise_ptr += n_elements


def one_pass_combine_fwd(
    latents: torch.Tensor,
    noise_pred: torch.Tensor,
    latent_coefficient: float,
    noise_coefficients: torch.Tensor,
) -> torch.Tensor:
    out = torch.empty(latents.shape, dtype=latents.dtype, device=latents.device)
    if out.numel():
        with on_device_of(latents):
            _forward_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                latents.contiguous(),
                noise_pred.contiguous(),
                noise_coefficients.contiguous(),
                out,
                latent_coefficient,
                len(noise_coefficients),
                out.numel(),
                BLOCK,
            )
    return out


def one_pass_combine_bwd(
    grad_out: torch.Tensor,
    noise_pred: torch.Tensor,
    latent_coefficient: float,
    noise_coefficients: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = grad_out.device
    timesteps, blocks = len(noise_coefficients), triton.cdiv(grad_out.numel(), BLOCK)
    grad_latents = torch.empty(grad_out.shape, dtype=grad_out.dtype, device=device)
    grad_noise = torch.empty(noise_pred.shape, dtype=noise_pred.dtype, device=device)
    partial = torch.empty((blocks, timesteps), dtype=torch.float32, device=device)
    if grad_out.numel():
        with on_device_of(grad_out):
            _backward_kernel[(blocks,)](
                grad_out.contiguous(),
                noise_pred.contiguous(),
                noise_coefficients.contiguous(),
                grad_latents,
                grad_noise,
                partial,
                latent_coefficient,
                timesteps,
                grad_out.numel(),
                BLOCK,
            )
    return grad_latents, grad_noise, partial.sum(0).to(noise_coefficients.dtype)
