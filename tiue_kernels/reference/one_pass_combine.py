"""S z + sum_k E_k eps_k: the K scheduler steps in one linear map."""

import torch

from tiue_kernels.layout import like


def one_pass_combine_fwd(
    latents: torch.Tensor,
    noise_pred: torch.Tensor,
    latent_coefficient: float,
    noise_coefficients: torch.Tensor,
) -> torch.Tensor:
    dtype = torch.promote_types(latents.dtype, torch.float32)
    total = torch.tensordot(noise_coefficients.to(dtype), noise_pred.to(dtype), dims=1)
    return like((latent_coefficient * latents.to(dtype) + total).to(latents.dtype), latents)


def one_pass_combine_bwd(
    grad_out: torch.Tensor,
    noise_pred: torch.Tensor,
    latent_coefficient: float,
    noise_coefficients: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(grad_out.dtype, torch.float32)
    grad = grad_out.to(dtype)
    grad_noise_coefficients = noise_pred.to(dtype).flatten(1) @ grad.flatten()
    return (
        like((latent_coefficient * grad).to(grad_out.dtype), grad_out),
        torch.tensordot(noise_coefficients.to(dtype), grad, dims=0).to(noise_pred.dtype),
        grad_noise_coefficients.to(noise_coefficients.dtype),
    )
