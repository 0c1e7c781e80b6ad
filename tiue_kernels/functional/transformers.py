"""Attention, projections and feed-forward of a transformer over K timesteps."""

import torch

from tiue_kernels import ops
from tiue_kernels.checks import Checks


def cross_timestep_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    scale: float | None = None,
    attention_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multi-head attention in which the K timesteps of a sample read the same keys and values.

    With B rows of keys (text) the timesteps join the query axis; with K*B rows (self-attention)
    every row reads its own.

    Args:
        query: [K*B, tokens, heads * head_dim].
        key: [B, key tokens, heads * head_dim], or [K*B, ...].
        value: as key.
        num_heads: heads that the channels are split into.
        scale: factor on the scores; head_dim ** -0.5 by default.
        attention_bias: [rows of key, 1, key tokens], added to the scores.

    Returns:
        [K*B, tokens, heads * head_dim].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("cross_timestep_attention")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.require(
            tensor.ndim == 3, f"{name} must be [rows, tokens, channels], got {tuple(tensor.shape)}"
        )
    checks.rows("query", query, "key", key)
    checks.require(
        key.shape == value.shape,
        f"key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}",
    )
    checks.require(
        num_heads > 0 and query.shape[2] == key.shape[2] and query.shape[2] % num_heads == 0,
        f"query and key need the same channels, a multiple of {num_heads} heads, got "
        f"{query.shape[2]} and {key.shape[2]}",
    )
    checks.require(key.shape[1] > 0, "key must have a token at least")
    if attention_bias is not None:
        wanted = (key.shape[0], 1, key.shape[1])
        checks.require(
            attention_bias.shape == wanted,
            f"attention_bias must be {wanted}, got {tuple(attention_bias.shape)}",
        )
    if scale is None:
        scale = (query.shape[2] // num_heads) ** -0.5
    query, key, value = checks.one_dtype(lower=True, query=query, key=key, value=value)
    checks.tensors(query=query, attention_bias=attention_bias)
    return ops.cross_timestep_attention.forward(
        query, key, value, num_heads, scale, attention_bias
    )[0]


def group_norm_linear(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """linear(group_norm(x)) of every pixel, as tokens: how a transformer takes in a map.

    Keeps x and the statistics for backward and computes the norm again.

    Args:
        x: [rows, C, H, W].
        num_groups: groups of the norm.
        norm_weight: [C] scale of the norm.
        norm_bias: [C] shift of the norm.
        weight: [C_out, C]; of a 1 x 1 convolution, flattened.
        bias: [C_out].
        eps: added to the variance.

    Returns:
        [rows, H*W, C_out].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("group_norm_linear")
    checks.maps(x=x)
    checks.norm(x.shape[1], num_groups, norm_weight, norm_bias)
    checks.require(
        weight.ndim == 2 and weight.shape[1] == x.shape[1],
        f"weight must be [C_out, {x.shape[1]}], got {tuple(weight.shape)}",
    )
    checks.tensors(x=x, norm_weight=norm_weight, norm_bias=norm_bias)
    x, weight, bias = checks.one_dtype(lower=True, x=x, weight=weight, bias=bias)
    return ops.group_norm_linear.forward(x, num_groups, norm_weight, norm_bias, eps, weight, bias)[
        0
    ]


def group_norm_tokens(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """group_norm(x) as tokens, a pixel each: how a map becomes what a transformer reads.

    Args:
        x: [rows, C, H, W].
        num_groups: groups of the norm.
        weight: [C] scale of the norm.
        bias: [C] shift of the norm.
        eps: added to the variance.

    Returns:
        [rows, H*W, C].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("group_norm_tokens")
    checks.maps(x=x)
    checks.norm(x.shape[1], num_groups, weight, bias)
    checks.tensors(x=x, weight=weight, bias=bias)
    return ops.group_norm_tokens.forward(x, num_groups, weight, bias, eps)[0]


def layer_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weights: list[torch.Tensor],
    eps: float = 1e-5,
) -> list[torch.Tensor]:
    """linear_i(layer_norm(x)) for several weights, e.g. query, key and value; frugal in backward.

    Keeps x and the statistics for backward and computes the norm again.

    Args:
        x: [..., C].
        norm_weight: [C] scale of the norm.
        norm_bias: [C] shift of the norm.
        weights: [C_i, C] each, one at least.
        eps: added to the variance.

    Returns:
        [..., C_i] each.

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("layer_norm_linear")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        checks.require(
            tensor.shape == x.shape[-1:],
            f"{name} must be ({x.shape[-1]},), got {tuple(tensor.shape)}",
        )
    checks.require(len(weights) > 0, "weights must hold a weight at least")
    named = {f"weights[{index}]": weight for index, weight in enumerate(weights)}
    for name, weight in named.items():
        checks.require(
            weight.ndim == 2 and weight.shape[1] == x.shape[-1],
            f"{name} must be [C_out, {x.shape[-1]}], got {tuple(weight.shape)}",
        )
    checks.tensors(x=x, norm_weight=norm_weight, norm_bias=norm_bias)
    _, *weights = checks.one_dtype(lower=True, x=x, **named)
    return ops.layer_norm_linear.forward(x, norm_weight, norm_bias, eps, weights)[0]


def adaptive_layer_norm(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """LayerNorm(x) * (1 + scale) + shift (adaLN; Peebles and Xie 2023, arXiv 2212.09748).

    The norm has no parameters of its own. Tokens that all timesteps share are normalised once.

    Args:
        x: [K*B, N, C], or [B, N, C] where all timesteps share the tokens.
        scale: [K*B, C].
        shift: [K*B, C], in the dtype of scale, which may be another than that of x.
        eps: added to the variance.

    Returns:
        [K*B, N, C] in the dtype of x.

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("adaptive_layer_norm")
    checks.require(x.ndim == 3, f"x must be [rows, N, C], got {tuple(x.shape)}")
    checks.require(
        scale.shape == shift.shape and scale.ndim == 2 and scale.shape[1] == x.shape[2],
        f"scale and shift must be [K*B, {x.shape[2]}], got {tuple(scale.shape)} and"
        f" {tuple(shift.shape)}",
    )
    rows, shared = scale.shape[0], x.shape[0]
    checks.require(
        (rows == 0) == (shared == 0) and rows % max(shared, 1) == 0,
        f"the {rows} rows of scale must be a multiple of the {shared} rows of x",
    )
    checks.tensors(x=x, scale=scale, shift=shift)
    scale, shift = checks.one_dtype(scale=scale, shift=shift)
    return ops.adaptive_layer_norm.forward(x, scale, shift, eps)[0]


def shared_skip_layer_norm_linear(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """linear(LayerNorm(concat(hidden, skip))), without concat; the skip's half once for all k.

    Hunyuan-DiT's long skips. Statistics and product are split at the border; keeps its inputs for
    backward, which splits likewise.

    Args:
        hidden: [K*B, N, C].
        skip: [B, N, D], shared by all timesteps.
        norm_weight: [C + D] scale of the norm.
        norm_bias: [C + D] shift of the norm.
        weight: [C_out, C + D].
        bias: [C_out].
        eps: added to the variance.

    Returns:
        [K*B, N, C_out].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("shared_skip_layer_norm_linear")
    checks.require(hidden.ndim == 3, f"hidden must be [K*B, N, C], got {tuple(hidden.shape)}")
    checks.require(
        skip.ndim == 3 and skip.shape[1] == hidden.shape[1] and skip.shape[2] > 0,
        f"skip must be [B, {hidden.shape[1]}, D], got {tuple(skip.shape)}",
    )
    checks.rows("hidden", hidden, "skip", skip)
    width = hidden.shape[2] + skip.shape[2]
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        checks.require(
            tensor.shape == (width,), f"{name} must be ({width},), got {tuple(tensor.shape)}"
        )
    checks.require(
        weight.ndim == 2 and weight.shape[1] == width,
        f"weight must be [C_out, {width}], got {tuple(weight.shape)}",
    )
    checks.tensors(hidden=hidden, norm_weight=norm_weight, norm_bias=norm_bias)
    hidden, skip, weight, bias = checks.one_dtype(
        lower=True, hidden=hidden, skip=skip, weight=weight, bias=bias
    )
    return ops.shared_skip_layer_norm_linear.forward(
        hidden, skip, norm_weight, norm_bias, eps, weight, bias
    )


def gated_residual(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + gate * y: how a branch of a transformer block joins its tokens (arXiv 2212.09748).

    Args:
        x: [K*B, N, C], or [B, N, C] where all timesteps share the tokens.
        gate: [K*B, C], which may be of another dtype than x.
        y: [K*B, N, C], the branch, in the dtype of x.

    Returns:
        [K*B, N, C].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("gated_residual")
    checks.require(x.ndim == 3, f"x must be [rows, N, C], got {tuple(x.shape)}")
    checks.rows("y", y, "x", x)
    checks.require(
        y.ndim == 3 and y.shape[1:] == x.shape[1:],
        f"y must be [K*B, {x.shape[1]}, {x.shape[2]}], got {tuple(y.shape)}",
    )
    wanted = (y.shape[0], x.shape[2])
    checks.require(gate.shape == wanted, f"gate must be {wanted}, got {tuple(gate.shape)}")
    checks.tensors(x=x, gate=gate, y=y)
    x, y = checks.one_dtype(x=x, y=y)
    return ops.gated_residual.forward(x, gate, y)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """x1 * gelu(x2) with the exact error function (Shazeer 2020, arXiv 2002.05202).

    Args:
        x: [..., 2 C]; x1 is the first half of the last axis, x2 the second.

    Returns:
        [..., C].

    Raises:
        ValueError: the last axis is odd.

    Examples:
        >>> geglu(torch.tensor([2.0, -3.0, 1.0, 0.0]))
        tensor([1.6827, -0.0000])
    """
    checks = Checks("geglu")
    checks.require(
        x.ndim > 0 and x.shape[-1] % 2 == 0, "the last axis of x must be even: it is halved"
    )
    checks.tensors(x=x)
    return ops.geglu.forward(x)


def geglu_feed_forward(
    x: torch.Tensor,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    recompute_projection: bool = False,
) -> torch.Tensor:
    """linear(geglu(linear(layer_norm(x)))): a transformer block's feed-forward, frugal in backward.

    Keeps x and the projection [..., 2 D] for backward, and computes the norm and geglu again; with
    `recompute_projection` keeps x alone and runs the first product again too.

    Args:
        x: [..., C].
        projection_weight: [2 D, C].
        projection_bias: [2 D].
        weight: [C_out, D].
        bias: [C_out].
        norm_weight: [C] scale of the layer norm; None for no norm.
        norm_bias: [C] shift of the layer norm, given where the scale is.
        eps: added to the variance.
        recompute_projection: whether backward computes the projection again.

    Returns:
        [..., C_out].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("geglu_feed_forward")
    checks.require(
        x.ndim > 1 and projection_weight.ndim == 2 and projection_weight.shape[1] == x.shape[-1],
        f"projection_weight must be [2 D, {x.shape[-1]}], got {tuple(projection_weight.shape)}",
    )
    checks.require(
        weight.ndim == 2 and 2 * weight.shape[1] == projection_weight.shape[0],
        f"weight must be [C_out, {projection_weight.shape[0] / 2:g}], half the rows of "
        f"projection_weight, got {tuple(weight.shape)}",
    )
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        checks.require(
            tensor is None or tensor.shape == x.shape[-1:],
            f"{name} must be ({x.shape[-1]},) or None",
        )
    checks.require((norm_weight is None) == (norm_bias is None), "a norm needs scale and shift")
    checks.tensors(x=x, norm_weight=norm_weight, norm_bias=norm_bias)
    _, *linear = checks.one_dtype(
        lower=True,
        x=x,
        projection_weight=projection_weight,
        projection_bias=projection_bias,
        weight=weight,
        bias=bias,
    )
    keep = torch.is_grad_enabled() and not recompute_projection
    return ops.geglu_feed_forward.forward(x, norm_weight, norm_bias, eps, *linear, keep)[0]
