"""One layer norm, several projections of its result.

Backward needs x and the statistics alone: the normalised tokens are computed again, and not kept.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.ops._library import declare, statistics_dtype


def normalise(
    x: torch.Tensor, norm_weight: torch.Tensor, norm_bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LayerNorm(x) over the last axis with its mean and rstd, parameters in any dtype."""
    norm_weight, norm_bias = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    return torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)


def empty_statistics(x: torch.Tensor) -> torch.Tensor:
    """For fakes: the mean or the rstd of LayerNorm; torch's for a CPU have the dtype of x."""
    dtype = x.dtype if x.device.type == "cpu" else statistics_dtype(x.dtype)
    return x.new_empty(*x.shape[:-1], 1, dtype=dtype)


def normalise_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of LayerNorm at x, weight and bias, each in its dtype."""
    weight, bias = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_out.to(x.dtype), x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )
    return grad_x, grad_weight.to(norm_weight.dtype), grad_bias.to(norm_bias.dtype)


def _run_forward(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weights: list[torch.Tensor],
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    tokens, mean, rstd = normalise(x, norm_weight, norm_bias, eps)
    tokens = tokens.to(weights[0].dtype)
    return [F.linear(tokens, weight) for weight in weights], mean, rstd


def _fake(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weights: list[torch.Tensor],
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    stats = empty_statistics(x)
    outputs = [weight.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return outputs, stats, torch.empty_like(stats)


def _run_backward(
    grads_out: list[torch.Tensor],
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weights: list[torch.Tensor],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    output_mask: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    need_norm, need_weights = output_mask
    grads_weight = []
    if need_weights:
        tokens = normalise(x, norm_weight, norm_bias, eps)[0].to(weights[0].dtype).flatten(0, -2)
        grads_weight = [grad.flatten(0, -2).t() @ tokens for grad in grads_out]
    norm_grads = (x.new_empty(0), x.new_empty(0), x.new_empty(0))
    if need_norm:
        grad = grads_out[0] @ weights[0]
        for grad_out, weight in zip(grads_out[1:], weights[1:], strict=True):
            grad = torch.addmm(grad.flatten(0, -2), grad_out.flatten(0, -2), weight).view_as(grad)
        norm_grads = normalise_backward(grad, x, mean, rstd, norm_weight, norm_bias)
    return *norm_grads, grads_weight


forward, backward = declare(
    "layer_norm_linear",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor[] weights)"
    " -> (Tensor[] out, Tensor mean, Tensor rstd)",
    "(Tensor[] grads_out, Tensor x, Tensor norm_weight, Tensor norm_bias, float eps,"
    " Tensor[] weights, Tensor mean, Tensor rstd, bool[2] output_mask)"
    " -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor[] grad_weights)",
    fake=_fake,
    wanted=[("x", "norm_weight", "norm_bias"), ("weights",)],
    run=(_run_forward, _run_backward),
    decomposition=_run_forward,
)
