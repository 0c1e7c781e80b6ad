"""KL(N(mu, var) || N(0, 1)) of every noise map."""

import torch

from tiue_kernels.dispatch import ANYWHERE, KERNEL
from tiue_kernels.ops._library import declare, statistics_dtype
from tiue_kernels.reference.noise_kl import noise_kl_fwd


def _fake(noise_pred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kl = noise_pred.new_empty(noise_pred.shape[:-3], dtype=statistics_dtype(noise_pred.dtype))
    return kl, kl.new_empty(2, *kl.shape)


forward, backward = declare(
    "noise_kl",
    "(Tensor noise_pred) -> (Tensor kl, Tensor moments)",
    "(Tensor grad_kl, Tensor noise_pred, Tensor moments) -> Tensor grad_noise_pred",
    fake=_fake,
    kernels={"triton": KERNEL, "reference": ANYWHERE},
    decomposition=noise_kl_fwd,
)
