"""`tiue::noise_kl_fwd` and `_bwd`."""

import torch

from tiue_kernels.ops._library import define, statistics_dtype


def _fake_fwd(noise_pred):
    kl = noise_pred.new_empty(noise_pred.shape[:-3], dtype=statistics_dtype(noise_pred.dtype))
    return kl, kl.new_empty(2, *kl.shape)


def _fake_bwd(grad_kl, noise_pred, moments):
    return noise_pred.new_empty(noise_pred.shape)


forward = define("noise_kl_fwd", "(Tensor noise_pred) -> (Tensor, Tensor)", _fake_fwd)
backward = define(
    "noise_kl_bwd", "(Tensor grad_kl, Tensor noise_pred, Tensor moments) -> Tensor", _fake_bwd
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad_kl, _moments):
    return backward(grad_kl, *ctx.saved_tensors)


torch.library.register_autograd("tiue::noise_kl_fwd", _backward, setup_context=_setup_context)
