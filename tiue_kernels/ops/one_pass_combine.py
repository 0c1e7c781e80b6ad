"""`tiue::one_pass_combine_fwd` and `_bwd`."""

import torch

from tiue_kernels.ops._library import define, rows_like


def _fake_fwd(latents, noise_pred, latent_coefficient, noise_coefficients):
    return rows_like(latents, *latents.shape)


def _fake_bwd(grad_out, noise_pred, latent_coefficient, noise_coefficients):
    return (
        rows_like(grad_out, *grad_out.shape),
        noise_pred.new_empty(noise_pred.shape),
        noise_coefficients.new_empty(noise_coefficients.shape),
    )


forward = define(
    "one_pass_combine_fwd",
    "(Tensor latents, Tensor noise_pred, float latent_coefficient, Tensor noise_coefficients)"
    " -> Tensor",
    _fake_fwd,
)
backward = define(
    "one_pass_combine_bwd",
    "(Tensor grad_out, Tensor noise_pred, float latent_coefficient, Tensor noise_coefficients)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_bwd,
)


def _setup_context(ctx, inputs, output):
    _, noise_pred, ctx.latent_coefficient, noise_coefficients = inputs
    ctx.save_for_backward(noise_pred, noise_coefficients)


def _backward(ctx, grad_out):
    noise_pred, noise_coefficients = ctx.saved_tensors
    grad_latents, grad_noise_pred, grad_coefficients = backward(
        grad_out, noise_pred, ctx.latent_coefficient, noise_coefficients
    )
    return grad_latents, grad_noise_pred, None, grad_coefficients


torch.library.register_autograd(
    "tiue::one_pass_combine_fwd", _backward, setup_context=_setup_context
)
