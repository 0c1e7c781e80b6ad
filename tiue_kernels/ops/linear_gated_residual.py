"""x + gate * linear(tokens): how a branch of a transformer block joins its tokens.

Backward does without the branch, y = W tokens + b. The gate's gradient, sum_n g y over the tokens
of a row, is the sum over c of W times that row's part of the weight's gradient, G = g^T tokens,
and b times sum_n g; the weight's own is the sum of gate * G over the rows. So one product gives
both, which is the one that the weight's gradient takes anyway.
"""

import torch
import torch.nn.functional as F

from tiue_kernels.ops import gated_residual
from tiue_kernels.ops._library import declare, statistics_dtype
from tiue_kernels.reference.adaptive_layer_norm import timesteps_of
from tiue_kernels.reference.gated_residual import gated_residual_fwd

# Values of G held at once, by whole rows: 4 MiB in float32.
MOST_PRODUCTS = 2**20

# Of gate, tokens, weight and bias.
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _run_forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return gated_residual.forward(x, gate, F.linear(tokens, weight, bias).to(x.dtype))


def _decomposed(
    x: torch.Tensor,
    gate: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return gated_residual_fwd(x, gate, F.linear(tokens, weight, bias).to(x.dtype))


def _fake(
    x: torch.Tensor,
    gate: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(gate.shape[0], *x.shape[1:])


def _run_backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output_mask: list[bool],
) -> tuple[torch.Tensor, ...]:
    grad_x = residual_backward(grad_out, x, gate) if output_mask[0] else grad_out.new_empty(0)
    return grad_x, *branch_backward(grad_out, gate, tokens, weight, bias, output_mask[1:])


def residual_backward(grad_out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The gradient of x in x + branch, a tensor of its own."""
    timesteps = timesteps_of(gate, x)
    if timesteps == 1:
        return grad_out.clone(memory_format=torch.contiguous_format)
    rows = grad_out.unflatten(0, (timesteps, len(x)))
    return rows.sum(0, dtype=statistics_dtype(x.dtype)).to(x.dtype)


def branch_backward(
    grad_out: torch.Tensor,
    gate: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    wanted: list[bool],
) -> Gradients:
    """Gradients of gate * linear(tokens).

    Args:
        grad_out: [K*B, N, C].
        gate: [K*B, C].
        tokens: [K*B, N, D].
        weight: [C, D].
        bias: [C] or None.
        wanted: whether those of gate, tokens, weight and bias are; else they are empty.
    """
    need_gate, need_tokens, need_weight, need_bias = wanted
    wide = statistics_dtype(grad_out.dtype)
    none = grad_out.new_empty(0)
    grad_gate = grad_tokens = grad_weight = grad_bias = none
    gates = gate.to(wide)
    sums = grad_out.sum(1, dtype=wide)  # (K*B, C)
    if need_tokens:
        branch = (grad_out * gate.to(grad_out.dtype).unsqueeze(1)).to(weight.dtype)
        grad_tokens = branch @ weight
    if need_gate or need_weight:
        narrow = grad_out.to(tokens.dtype)
        of_gate, of_weight = torch.empty_like(sums), sums.new_zeros(weight.shape)
        factors = weight.to(wide)
        size = max(1, MOST_PRODUCTS // max(weight.numel(), 1))
        rows = (part.split(size) for part in (narrow, tokens, gates, of_gate))
        for grad, own, factor, out in zip(*rows, strict=True):
            products = (grad.transpose(1, 2) @ own).to(wide)  # G, (rows, C, D)
            out.copy_((products * factors).sum(2))
            of_weight += products.mul_(factor.unsqueeze(2)).sum(0)
        if need_gate:
            of_gate = of_gate if bias is None else of_gate.addcmul_(sums, bias.to(wide))
            grad_gate = of_gate.to(gate.dtype)
        if need_weight:
            grad_weight = of_weight.to(weight.dtype)
    if need_bias:
        grad_bias = (gates * sums).sum(0).to(weight.dtype)
    return grad_gate, grad_tokens, grad_weight, grad_bias


forward, backward = declare(
    "linear_gated_residual",
    "(Tensor x, Tensor gate, Tensor tokens, Tensor weight, Tensor? bias) -> Tensor out",
    "(Tensor grad_out, Tensor x, Tensor gate, Tensor tokens, Tensor weight, Tensor? bias,"
    " bool[5] output_mask) -> (Tensor grad_x, Tensor grad_gate, Tensor grad_tokens,"
    " Tensor grad_weight, Tensor grad_bias)",
    fake=_fake,
    wanted=[("x",), ("gate",), ("tokens",), ("weight",), ("bias",)],
    run=(_run_forward, _run_backward),
    made_of=("gated_residual",),
    decomposition=_decomposed,
)
