"""S z + sum_k E_k eps_k."""

import torch

from tiue_kernels.dispatch import ANYWHERE, KERNEL
from tiue_kernels.ops._library import declare, rows_like
from tiue_kernels.reference.one_pass_combine import one_pass_combine_fwd


def _fake(
    latents: torch.Tensor,
    noise_pred: torch.Tensor,
    latent_coefficient: float,
    noise_coefficients: torch.Tensor,
) -> torch.Tensor:
    return rows_like(latents, *latents.shape)


def _fake_backward(
    grad_out: torch.Tensor,
    noise_pred: torch.Tensor,
    latent_coefficient: float,
    noise_coefficients: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        rows_like(grad_out, *grad_out.shape),
        noise_pred.new_empty(noise_pred.shape),
        noise_coefficients.new_empty(noise_coefficients.shape),
    )


forward, backward = declare(
    "one_pass_combine",
    "(Tensor latents, Tensor noise_pred, float latent_coefficient, Tensor noise_coefficients)"
    " -> Tensor out",
    "(Tensor grad_out, Tensor noise_pred, float latent_coefficient, Tensor noise_coefficients)"
    " -> (Tensor grad_latents, Tensor grad_noise_pred, Tensor grad_noise_coefficients)",
    fake=_fake,
    fake_backward=_fake_backward,
    kernels={"triton": KERNEL, "reference": ANYWHERE},
    decomposition=one_pass_combine_fwd,
)
