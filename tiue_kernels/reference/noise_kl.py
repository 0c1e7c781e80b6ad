"""KL(N(mu, var) || N(0, 1)) of each noise map, moments over channels and pixels."""

import torch

# Below a deviation of 1e-6 (noise has 1) the term grows no more: a constant map would give an
# infinite loss and NaN gradients.
LEAST_VARIANCE = 1e-12


def noise_kl_fwd(noise_pred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    maps = noise_pred.flatten(-3)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    if maps.shape[:-1].numel() == 0:  # of no maps at all torch warns, as of maps without values
        kl = maps.new_zeros(maps.shape[:-1])
        return kl, torch.stack([kl, kl])
    variance, mean = torch.var_mean(maps, dim=-1, correction=1)
    kl = 0.5 * (mean.square() + variance - 1 - variance.clamp_min(LEAST_VARIANCE).log())
    return kl, torch.stack([mean, variance])


def noise_kl_bwd(
    grad_kl: torch.Tensor, noise_pred: torch.Tensor, moments: torch.Tensor
) -> torch.Tensor:
    mean, variance = moments[..., None, None, None]
    maps = noise_pred.to(moments.dtype)
    count = noise_pred.shape[-3:].numel()
    # d mean / d x = 1 / n and d var / d x = 2 (x - mean) / (n - 1).
    of_log = torch.where(variance >= LEAST_VARIANCE, 1 / variance, torch.zeros_like(variance))
    slope = mean / count + (maps - mean) * (1 - of_log) / (count - 1)
    return (grad_kl[..., None, None, None] * slope).to(noise_pred.dtype).contiguous()
