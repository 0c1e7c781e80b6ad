"""What is done with the K model outputs."""

import math

import torch

from tiue_kernels import ops
from tiue_kernels.checks import Checks


def one_pass_combine(
    latents: torch.Tensor,
    noise_pred: torch.Tensor,
    latent_coefficient: float,
    noise_coefficients: torch.Tensor,
) -> torch.Tensor:
    """S z + sum_k E_k eps_k: K scheduler steps in one linear map (TiUE, arXiv 2505.21960).

    Args:
        latents: [B, ...], z.
        noise_pred: [K, B, ...], the K model outputs.
        latent_coefficient: S.
        noise_coefficients: [K], E_k.

    Returns:
        [B, ...] in the dtype of latents.

    Raises:
        ValueError: the shapes do not fit together.

    Examples:
        >>> noise_pred = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # K = 2, B = 2
        >>> one_pass_combine(torch.ones(2), noise_pred, 4.0, torch.tensor([-2.0, -1.0]))
        tensor([-1., -4.])
    """
    checks = Checks("one_pass_combine")
    wanted = (*noise_coefficients.shape, *latents.shape)
    checks.require(
        noise_coefficients.ndim == 1 and noise_pred.shape == wanted,
        f"noise_pred must be {wanted} (K, then the shape of latents), got "
        f"{tuple(noise_pred.shape)}",
    )
    checks.tensors(latents=latents, noise_pred=noise_pred)
    noise_coefficients = noise_coefficients.to(latents.device)
    return ops.one_pass_combine.forward(latents, noise_pred, latent_coefficient, noise_coefficients)


def noise_kl(noise_pred: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, var) || N(0, 1)) of every noise map (TiUE, arXiv 2505.21960).

    0.5 (mu^2 + var - 1 - log var), mu and the unbiased var over all of C, H, W. The logarithm sees
    a variance of at least 1e-12, so a constant map has a finite loss and finite gradients.

    Args:
        noise_pred: [..., C, H, W].

    Returns:
        [...], at least float32; the published loss is 0.1 times their sum.

    Raises:
        ValueError: fewer than three axes, or maps of one value (their variance is undefined).
    """
    checks = Checks("noise_kl")
    checks.require(
        noise_pred.ndim >= 3 and math.prod(noise_pred.shape[-3:]) >= 2,
        f"noise_pred must be [..., C, H, W] with two values a map or more, got "
        f"{tuple(noise_pred.shape)}",
    )
    checks.tensors(noise_pred=noise_pred)
    return ops.noise_kl.forward(noise_pred)[0]
