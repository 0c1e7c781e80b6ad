"""The branches of a transformer block that a timestep modulates and gates (arXiv 2212.09748)."""

import torch

from tiue_kernels import ops
from tiue_kernels.checks import Checks


def adaptive_layer_norm_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor] | None = None,
    eps: float = 1e-6,
) -> list[torch.Tensor]:
    """linear_i(LayerNorm(x) * (1 + scale) + shift), e.g. query, key and value; frugal in backward.

    Keeps x and the statistics for backward and computes the modulated norm again.

    Args:
        x: [K*B, N, C], or [B, N, C] where all timesteps share the tokens.
        scale: [K*B, C].
        shift: [K*B, C], in the dtype of scale, which may be another than that of x.
        weights: [C_i, C] each, one at least.
        biases: [C_i] each, or None.
        eps: added to the variance.

    Returns:
        [K*B, N, C_i] each.

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("adaptive_layer_norm_linear")
    _modulation(checks, x, scale, shift)
    checks.require(len(weights) > 0, "weights must hold a weight at least")
    biases = biases or []
    checks.require(
        len(biases) in (0, len(weights)),
        f"biases must be None or one for each of the {len(weights)} weights, got {len(biases)}",
    )
    named = {f"weights[{index}]": weight for index, weight in enumerate(weights)}
    for name, weight in named.items():
        _weight(checks, name, weight, x.shape[2])
    for index, (bias, weight) in enumerate(zip(biases, weights, strict=False)):
        _bias(checks, f"biases[{index}]", bias, weight)
        named[f"biases[{index}]"] = bias
    scale, shift = checks.one_dtype(scale=scale, shift=shift)
    _, *layers = checks.one_dtype(lower=True, x=x, **named)
    count = len(weights)
    return ops.adaptive_layer_norm_linear.forward(
        x, scale, shift, eps, layers[:count], layers[count:]
    )[0]


def linear_gated_residual(
    x: torch.Tensor,
    gate: torch.Tensor,
    tokens: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x + gate * linear(tokens): an attention's output as it joins; frugal in backward.

    Keeps the tokens for backward and not the branch: the product that the weight's gradient takes
    gives the gate's as well.

    Args:
        x: [K*B, N, C], or [B, N, C] where all timesteps share the tokens.
        gate: [K*B, C], which may be of another dtype than x.
        tokens: [K*B, N, D].
        weight: [C, D].
        bias: [C].

    Returns:
        [K*B, N, C] in the dtype of x.

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("linear_gated_residual")
    checks.require(x.ndim == 3, f"x must be [rows, N, C], got {tuple(x.shape)}")
    checks.rows("tokens", tokens, "x", x)
    checks.require(
        tokens.ndim == 3 and tokens.shape[1] == x.shape[1],
        f"tokens must be [K*B, {x.shape[1]}, D], got {tuple(tokens.shape)}",
    )
    _gate(checks, gate, tokens.shape[0], x.shape[2])
    _weight(checks, "weight", weight, tokens.shape[2], x.shape[2])
    _bias(checks, "bias", bias, weight)
    checks.tensors(x=x, gate=gate)
    _, tokens, weight, bias = checks.one_dtype(
        lower=True, x=x, tokens=tokens, weight=weight, bias=bias
    )
    return ops.linear_gated_residual.forward(x, gate, tokens, weight, bias)


def adaptive_feed_forward(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    gate: torch.Tensor,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    approximate: str = "tanh",
    eps: float = 1e-6,
    recompute_projection: bool = False,
) -> torch.Tensor:
    """x + gate * linear(gelu(linear(LayerNorm(x) * (1 + scale) + shift))), frugal in backward.

    Keeps x and the projection [K*B, N, D] for backward, computes norm and activation again, and
    does without the branch; with `recompute_projection` keeps x alone and runs the first product
    again too.

    Args:
        x: [K*B, N, C], or [B, N, C] where all timesteps share the tokens.
        scale: [K*B, C].
        shift: [K*B, C], in the dtype of scale, which may be another than that of x.
        gate: [K*B, C], likewise.
        projection_weight: [D, C].
        projection_bias: [D].
        weight: [C, D].
        bias: [C].
        approximate: of gelu, as torch's: "none" or "tanh".
        eps: added to the variance.
        recompute_projection: whether backward computes the projection again.

    Returns:
        [K*B, N, C] in the dtype of x.

    Raises:
        ValueError: the shapes do not fit together, or another approximation.
    """
    checks = Checks("adaptive_feed_forward")
    _modulation(checks, x, scale, shift)
    _gate(checks, gate, scale.shape[0], x.shape[2])
    _weight(checks, "projection_weight", projection_weight, x.shape[2])
    _bias(checks, "projection_bias", projection_bias, projection_weight)
    _weight(checks, "weight", weight, projection_weight.shape[0], x.shape[2])
    _bias(checks, "bias", bias, weight)
    checks.require(
        approximate in ("none", "tanh"), f"approximate must be none or tanh, got {approximate!r}"
    )
    checks.tensors(x=x, gate=gate)
    scale, shift = checks.one_dtype(scale=scale, shift=shift)
    _, *layers = checks.one_dtype(
        lower=True,
        x=x,
        projection_weight=projection_weight,
        projection_bias=projection_bias,
        weight=weight,
        bias=bias,
    )
    keep = torch.is_grad_enabled() and not recompute_projection
    return ops.adaptive_feed_forward.forward(
        x, scale, shift, gate, eps, *layers, approximate, keep
    )[0]


def _modulation(checks: Checks, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> None:
    checks.require(x.ndim == 3, f"x must be [rows, N, C], got {tuple(x.shape)}")
    checks.require(
        scale.shape == shift.shape and scale.ndim == 2 and scale.shape[1] == x.shape[2],
        f"scale and shift must be [K*B, {x.shape[2]}], got {tuple(scale.shape)} and"
        f" {tuple(shift.shape)}",
    )
    checks.rows("scale", scale, "x", x)
    checks.tensors(x=x, scale=scale, shift=shift)


def _gate(checks: Checks, gate: torch.Tensor, rows: int, channels: int) -> None:
    checks.require(
        gate.shape == (rows, channels), f"gate must be {(rows, channels)}, got {tuple(gate.shape)}"
    )


def _weight(
    checks: Checks, name: str, weight: torch.Tensor, channels: int, outputs: int | None = None
) -> None:
    checks.require(
        weight.ndim == 2 and weight.shape[1] == channels and outputs in (None, weight.shape[0]),
        f"{name} must be [{'C_out' if outputs is None else outputs}, {channels}], got"
        f" {tuple(weight.shape)}",
    )


def _bias(checks: Checks, name: str, bias: torch.Tensor | None, weight: torch.Tensor) -> None:
    checks.require(
        bias is None or bias.shape == weight.shape[:1],
        f"{name} must be ({weight.shape[0]},)",
    )
