"""KL(N(mu, var) || N(0, 1)) of each noise map, moments over channels and pixels."""

import torch


def noise_kl_fwd(noise_pred: torch.Tensor) -> torch.Tensor:
    maps = noise_pred.flatten(-3)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    variance, mean = torch.var_mean(maps, dim=-1, correction=1)
    return 0.5 * (mean.square() + variance - 1 - variance.log())
