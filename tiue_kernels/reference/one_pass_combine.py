"""S z + sum_k E_k eps_k: the K scheduler steps in one linear map."""

import torch


def one_pass_combine_fwd(
    latents: torch.Tensor,
    noise_pred: torch.Tensor,
    latent_coefficient: float,
    noise_coefficients: torch.Tensor,
) -> torch.Tensor:
    dtype = torch.promote_types(latents.dtype, torch.float32)
    total = torch.tensordot(noise_coefficients.to(dtype), noise_pred.to(dtype), dims=1)
    return (latent_coefficient * latents.to(dtype) + total).to(latents.dtype)
