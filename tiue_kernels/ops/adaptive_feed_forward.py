"""x + gate * feed_forward(LayerNorm(x) * (1 + scale) + shift): half of a transformer block.

Backward needs x and, unless that is computed again too, the first product; the modulated tokens and
their activation are computed again always, and the branch is not needed.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.ops import adaptive_layer_norm, gated_residual
from tiue_kernels.ops._library import declare, statistics_dtype
from tiue_kernels.ops.linear_gated_residual import branch_backward, residual_backward
from tiue_kernels.reference.adaptive_layer_norm import adaptive_layer_norm_fwd
from tiue_kernels.reference.gated_residual import gated_residual_fwd

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _run_forward(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    keep_projection: bool,
) -> Outputs:
    tokens, stats = adaptive_layer_norm.forward(x, scale, shift, eps)
    projection = F.linear(tokens.to(weight.dtype), projection_weight, projection_bias)
    branch = F.linear(F.gelu(projection, approximate=approximate), weight, bias)
    out = gated_residual.forward(x, gate, branch.to(x.dtype))
    return out, projection if keep_projection else weight.new_empty(0), stats


def _decomposed(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    keep_projection: bool,
) -> Outputs:
    tokens, stats = adaptive_layer_norm_fwd(x, scale, shift, eps)
    projection = F.linear(tokens.to(weight.dtype), projection_weight, projection_bias)
    branch = F.linear(F.gelu(projection, approximate=approximate), weight, bias)
    out = gated_residual_fwd(x, gate, branch.to(x.dtype))
    return out, projection if keep_projection else weight.new_empty(0), stats


def _fake(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    keep_projection: bool,
) -> Outputs:
    rows, tokens, _ = gate.shape[0], *x.shape[1:]
    projection = weight.new_empty(rows, tokens, projection_weight.shape[0])
    return (
        x.new_empty(rows, *x.shape[1:]),
        projection if keep_projection else weight.new_empty(0),
        x.new_empty(2, *x.shape[:-1], dtype=statistics_dtype(x.dtype)),
    )


def _run_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    approximate: str,
    projection: torch.Tensor,
    stats: torch.Tensor,
    output_mask: list[bool],
) -> tuple[torch.Tensor, ...]:
    need_x, need_gate, need_projection_weight, need_projection_bias, *need_output = output_mask
    none = grad_out.new_empty(0)
    tokens = none
    if need_projection_weight or not projection.numel():
        tokens = adaptive_layer_norm.forward(x, scale, shift, eps)[0].to(weight.dtype)
    if not projection.numel():
        projection = F.linear(tokens, projection_weight, projection_bias)
    before = need_x or need_projection_weight or need_projection_bias
    grad_gate, grad_active, *grads_output = branch_backward(
        grad_out,
        gate,
        F.gelu(projection, approximate=approximate),
        weight,
        bias,
        [need_gate, before, *need_output],
    )
    grads_x, grads_projection = [none] * 3, [none] * 2
    if before:
        grad_projection = torch.ops.aten.gelu_backward(
            grad_active, projection, approximate=approximate
        )
        rows = grad_projection.flatten(0, 1)  # (K*B*N, D)
        if need_projection_weight:
            grads_projection[0] = rows.t() @ tokens.flatten(0, 1)
        if need_projection_bias:
            grads_projection[1] = rows.sum(0)
        if need_x:
            grad = (grad_projection @ projection_weight).to(x.dtype)
            grads_x = list(adaptive_layer_norm.backward(grad, x, scale, shift, stats))
            grads_x[0] += residual_backward(grad_out, x, gate)
    return *grads_x, grad_gate, *grads_projection, *grads_output


forward, backward = declare(
    "adaptive_feed_forward",
    "(Tensor x, Tensor scale, Tensor shift, Tensor gate, float eps, Tensor projection_weight,"
    " Tensor? projection_bias, Tensor weight, Tensor? bias, str approximate, bool keep_projection)"
    " -> (Tensor out, Tensor projection, Tensor stats)",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor shift, Tensor gate, float eps,"
    " Tensor projection_weight, Tensor? projection_bias, Tensor weight, Tensor? bias,"
    " str approximate, Tensor projection, Tensor stats, bool[6] output_mask)"
    " -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift, Tensor grad_gate,"
    " Tensor grad_projection_weight, Tensor grad_projection_bias, Tensor grad_weight,"
    " Tensor grad_bias)",
    fake=_fake,
    wanted=[
        ("x", "scale", "shift"),
        ("gate",),
        ("projection_weight",),
        ("projection_bias",),
        ("weight",),
        ("bias",),
    ],
    run=(_run_forward, _run_backward),
    made_of=("adaptive_layer_norm", "gated_residual"),
    decomposition=_decomposed,
)
