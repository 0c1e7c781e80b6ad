"""One modulated layer norm over K timesteps, several projections of its result.

Backward needs x, its statistics and the modulation: the modulated tokens, which every projection
reads, are computed again, and not kept.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tiue_kernels.ops import adaptive_layer_norm
from tiue_kernels.ops._library import declare, statistics_dtype
from tiue_kernels.reference.adaptive_layer_norm import adaptive_layer_norm_fwd

Outputs = tuple[list[torch.Tensor], torch.Tensor]


def _run_forward(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
) -> Outputs:
    tokens, stats = adaptive_layer_norm.forward(x, scale, shift, eps)
    return _project(tokens, weights, biases), stats


def _decomposed(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
) -> Outputs:
    tokens, stats = adaptive_layer_norm_fwd(x, scale, shift, eps)
    return _project(tokens, weights, biases), stats


def _project(
    tokens: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]
) -> list[torch.Tensor]:
    tokens = tokens.to(weights[0].dtype)
    given: Sequence[torch.Tensor | None] = biases or [None] * len(weights)
    return [F.linear(tokens, weight, bias) for weight, bias in zip(weights, given, strict=True)]


def _fake(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
) -> Outputs:
    stats = x.new_empty(2, *x.shape[:-1], dtype=statistics_dtype(x.dtype))
    rows, tokens = scale.shape[0], x.shape[1]
    return [weight.new_empty(rows, tokens, weight.shape[0]) for weight in weights], stats


def _run_backward(
    grads_out: list[torch.Tensor],
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    stats: torch.Tensor,
    output_mask: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    need_tokens, need_weights, need_biases = output_mask
    columns = [grad.flatten(0, 1) for grad in grads_out]  # (K*B*N, C_i) each
    grads_weight, grads_bias = [], []
    if need_weights:
        tokens = adaptive_layer_norm.forward(x, scale, shift, eps)[0].to(weights[0].dtype)
        grads_weight = [grad.t() @ tokens.flatten(0, 1) for grad in columns]
    if need_biases and biases:
        grads_bias = [grad.sum(0) for grad in columns]
    grads = (columns[0].new_empty(0),) * 3
    if need_tokens:
        grad = columns[0] @ weights[0]
        for own, weight in zip(columns[1:], weights[1:], strict=True):
            grad.addmm_(own, weight)
        grad = grad.unflatten(0, grads_out[0].shape[:2]).to(x.dtype)
        grads = adaptive_layer_norm.backward(grad, x, scale, shift, stats)
    return *grads, grads_weight, grads_bias


forward, backward = declare(
    "adaptive_layer_norm_linear",
    "(Tensor x, Tensor scale, Tensor shift, float eps, Tensor[] weights, Tensor[] biases)"
    " -> (Tensor[] out, Tensor stats)",
    "(Tensor[] grads_out, Tensor x, Tensor scale, Tensor shift, float eps, Tensor[] weights,"
    " Tensor[] biases, Tensor stats, bool[3] output_mask) -> (Tensor grad_x, Tensor grad_scale,"
    " Tensor grad_shift, Tensor[] grad_weights, Tensor[] grad_biases)",
    fake=_fake,
    wanted=[("x", "scale", "shift"), ("weights",), ("biases",)],
    run=(_run_forward, _run_backward),
    made_of=("adaptive_layer_norm",),
    decomposition=_decomposed,
)
