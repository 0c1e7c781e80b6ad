"""The distillation's losses, each a function of tensors alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tiue.distill.config import Reduction, Weighting
from tiue_kernels import functional


def timestep_weights(sigma: Tensor, weighting: Weighting = "sigma2") -> Tensor:
    """Weigh the VSD difference by timestep: w_t = sigma_t^2 = 1 - abar_t, or 1.

    Args:
        sigma: Standard deviation of the noise in x_t, of any shape.
        weighting: ``sigma2`` as published, or ``uniform``.

    Returns:
        w_t, of the same shape.
    """
    return sigma.square() if weighting == "sigma2" else torch.ones_like(sigma)


def vsd_gradient(
    teacher_noise: Tensor,
    lora_noise: Tensor,
    sigma: Tensor,
    weighting: Weighting = "sigma2",
) -> Tensor:
    r"""Weigh the difference between what the teacher and its LoRA copy take for noise.

    .. math:: g = w_t (\epsilon_T^{cfg}(x_t) - \epsilon_{LoRA}^{cfg}(x_t))

    with :math:`w_t = \sigma_t^2 = 1 - \bar\alpha_t` for ``sigma2`` and 1 for ``uniform``. Of a flow
    the two are velocities :math:`v = \epsilon - x`, whose difference is that of the noises over
    :math:`1 - \sigma_t`: it does not vanish at the highest noise levels.

    Args:
        teacher_noise: The frozen teacher's noise, guided, [B, C, H, W].
        lora_noise: The LoRA teacher's noise at the same point, [B, C, H, W].
        sigma: Standard deviation of the noise in x_t, [B, 1, 1, 1].
        weighting: ``sigma2`` as published, or ``uniform``.

    Returns:
        g, [B, C, H, W] float32, without a graph.

    Source: TiUE (arXiv 2505.21960); ProlificDreamer (arXiv 2305.16213).
    """
    difference = (teacher_noise.float() - lora_noise.float()).detach()
    return timestep_weights(sigma, weighting) * difference


def vsd_loss(latents: Tensor, gradient: Tensor) -> Tensor:
    r"""Give latents a chosen gradient, as the squared distance to where it leads.

    .. math:: L = \frac{1}{2N} \lVert x - sg(x - g) \rVert^2, \quad \partial L / \partial x = g / N

    with N the number of elements. The value is formed of g itself and the gradient handed over
    directly: x - (x - g) would round g to the precision of x.

    Args:
        latents: The student's output x, [B, C, H, W].
        gradient: g of `vsd_gradient`, [B, C, H, W].

    Returns:
        The loss, a float32 scalar.

    Source: TiUE (arXiv 2505.21960).
    """
    return 0.5 * gradient.detach().square().mean() + with_gradient(latents, gradient)


def with_gradient(latents: Tensor, gradient: Tensor) -> Tensor:
    r"""Give latents a gradient that was found elsewhere: :math:`\partial L / \partial x = g / N`.

    Args:
        latents: The student's output x, [B, C, H, W].
        gradient: g, [B, C, H, W].

    Returns:
        0, a float32 scalar, with that gradient.
    """
    latents = latents.float()
    return ((latents - latents.detach()) * gradient.detach()).mean()


def kl_loss(noise_pred: Tensor, weight: float = 0.1, reduction: Reduction = "sum") -> Tensor:
    r"""Keep every predicted noise map as near to the standard normal as noise is.

    .. math:: L = \lambda \sum_n \tfrac12 (\mu_n^2 + s_n^2 - 1 - \log s_n^2)

    over the K*B maps n, with mean :math:`\mu_n` and unbiased variance :math:`s_n^2` over all of
    C, H and W.

    Args:
        noise_pred: The student's K noise predictions, [K, B, C, H, W].
        weight: Lambda; 0.1 as published.
        reduction: ``sum`` as published, whose strength grows with K*B, or ``mean``.

    Returns:
        The loss, a scalar of at least float32.

    Source: TiUE (arXiv 2505.21960).
    """
    maps = functional.noise_kl(noise_pred)
    return weight * (maps.sum() if reduction == "sum" else maps.mean())


def lora_loss(noise_pred: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    r"""Score the LoRA teacher on the student's own images: denoising, weighted by the signal.

    .. math:: L = E_{t, \epsilon} [\alpha_t \, mean(\epsilon_{LoRA}(x_t) - \epsilon)^2],
        \quad \alpha_t = \sqrt{\bar\alpha_t}

    Args:
        noise_pred: The LoRA teacher's noise, or of a flow its velocity, [B, C, H, W].
        noise: The noise that was added, or the velocity, [B, C, H, W].
        alpha: Scale of the signal in x_t, [B, 1, 1, 1]; of a flow 1.

    Returns:
        The loss, a float32 scalar.

    Source: TiUE (arXiv 2505.21960); ProlificDreamer (arXiv 2305.16213).
    """
    return (alpha * (noise_pred.float() - noise.float()).square()).mean()


def critic_loss(made: Tensor, real: Tensor) -> Tensor:
    r"""Teach a critic to tell real pictures from the student's.

    .. math:: L = mean(softplus(D(x_t))) + mean(softplus(-D(y_t)))

    Args:
        made: Logits D of the student's noisy images x_t, any shape.
        real: Logits of noisy pictures y_t, any shape.

    Returns:
        The loss, a float32 scalar.

    Source: DMD2 (arXiv 2405.14867); the non-saturating loss of arXiv 1406.2661.
    """
    return F.softplus(made.float()).mean() + F.softplus(-real.float()).mean()


def gan_loss(made: Tensor) -> Tensor:
    r"""Ask for images that the critic takes for real.

    .. math:: L = mean(softplus(-D(x_t)))

    Args:
        made: Logits D of the student's noisy images x_t, any shape.

    Returns:
        The loss, a float32 scalar.

    Source: DMD2 (arXiv 2405.14867); the non-saturating loss of arXiv 1406.2661.
    """
    return F.softplus(-made.float()).mean()


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, target: float = 0.35) -> Tensor:
    r"""Ask for pictures that CLIP finds near enough to their prompts, and for no more.

    .. math:: L = \max(0, \tau - \frac1B \sum_b \cos(i_b, c_b))

    Args:
        image_embeds: CLIP's embeddings of the pictures, [B, D].
        text_embeds: CLIP's embeddings of their prompts, [B, D].
        target: tau, the mean cosine from which the loss is 0.

    Returns:
        The loss, a float32 scalar.

    Source: TiUE (arXiv 2505.21960), where it is optional.
    """
    cosines = F.cosine_similarity(image_embeds.float(), text_embeds.float(), dim=-1)
    return F.relu(target - cosines.mean())
