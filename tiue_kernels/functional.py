"""The public operators: shapes and dtypes checked, defaults filled in, handed to the operator.

K is the number of decoder timesteps, B the batch. K*B rows are timestep-major (row k * B + b);
a tensor with B rows is shared by all timesteps. Every function is differentiable, once, in every
floating-point tensor, for float64, float32, float16 and bfloat16, contiguous and channels_last;
statistics and sums over timesteps are accumulated in float32 (float64 for float64 input). Data
tensors of a call share one dtype; scale and shift of a norm, time embedding and coefficients may
be of another. Under autocast data are brought to one dtype, as torch's own operators do.

Every function raises ValueError for shapes and devices that do not fit together, TypeError for
dtypes, and BackendError where a forced backend cannot serve the call.
"""

import torch

from tiue_kernels import convolution, ops
from tiue_kernels.checks import Checks


def shared_skip_group_norm_silu(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU(GroupNorm(concat(hidden, skip))) with the skip normalised once for all timesteps.

    A group that lies wholly in the skip has the same statistics for every timestep. Where the
    border between hidden and skip falls inside a group, that group's channels all go with the
    hidden part.

    Args:
        hidden: [K*B, C_h, H, W], the decoder's rows.
        skip: [B, C_s, H, W], the encoder's feature, shared by the K timesteps.
        num_groups: groups of the norm over C = C_h + C_s channels.
        weight: [C] scale of the norm.
        bias: [C] shift of the norm.
        eps: added to the variance.

    Returns:
        The hidden part [K*B, c0, H, W] and the skip part [B, C - c0, H, W], with c0 the first
        channel of the first group that lies wholly in the skip.

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("shared_skip_group_norm_silu")
    hidden, skip = _check_shared_skip(checks, hidden, skip, num_groups, weight, bias)
    return ops.shared_skip_group_norm_silu.forward(hidden, skip, num_groups, weight, bias, eps)[:2]


def shared_skip_group_norm_silu_conv2d(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    padding: int | tuple[int, int] = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """conv2d(SiLU(GroupNorm(concat(hidden, skip)))) in two summands, the skip's computed once.

    Keeps for backward its inputs and the statistics of the norm; SiLU(GroupNorm) is computed
    again there.

    Args:
        hidden: [K*B, C_h, H, W].
        skip: [B, C_s, H, W].
        num_groups: groups of the norm over C = C_h + C_s channels.
        norm_weight: [C] scale of the norm.
        norm_bias: [C] shift of the norm.
        weight: [C_out, C, kernel height, kernel width], stride 1.
        bias: [C_out]; it goes into the shared summand.
        eps: added to the variance.
        padding: zeros added on each side.

    Returns:
        [K*B, C_out, H', W'] and [B, C_out, H', W'], to be added row by row.

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("shared_skip_group_norm_silu_conv2d")
    hidden, skip = _check_shared_skip(checks, hidden, skip, num_groups, norm_weight, norm_bias)
    checks.convolution(hidden.shape[1] + skip.shape[1], weight)
    hidden, skip, weight, bias = checks.one_dtype(
        lower=True, hidden=hidden, skip=skip, weight=weight, bias=bias
    )
    rows, shared, *_ = ops.shared_skip_group_norm_silu_conv2d.forward(
        hidden, skip, num_groups, norm_weight, norm_bias, eps, weight, bias, _pair(padding)
    )
    if not shared.numel():  # no group lies wholly in the skip: the rows hold everything
        shared = rows.new_zeros(1).expand(skip.shape[0], *rows.shape[1:])
    return rows, shared


def broadcast_add_group_norm_silu_conv2d(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    scale_shift: bool = False,
    padding: int | tuple[int, int] = 0,
) -> torch.Tensor:
    """conv2d of `broadcast_add_group_norm_silu`, whose result is not kept for backward.

    Args:
        hidden: [K*B, C, H, W], or None when no row differs yet.
        shared: [B, C, H, W].
        time_embedding: [K*B, C], or [K*B, 2 C] with `scale_shift`.
        num_groups: groups of the norm over C channels.
        norm_weight: [C] scale of the norm.
        norm_bias: [C] shift of the norm.
        weight: [C_out, C, kernel height, kernel width], stride 1.
        bias: [C_out].
        eps: added to the variance.
        scale_shift: diffusers' `resnet_time_scale_shift="scale_shift"`.
        padding: zeros added on each side.

    Returns:
        [K*B, C_out, H', W'].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("broadcast_add_group_norm_silu_conv2d")
    norm = (num_groups, norm_weight, norm_bias)
    _check_broadcast_add(checks, hidden, shared, time_embedding, *norm, scale_shift)
    checks.convolution(shared.shape[1], weight)
    hidden, shared, weight, bias = checks.one_dtype(
        lower=True, hidden=hidden, shared=shared, weight=weight, bias=bias
    )
    return ops.broadcast_add_group_norm_silu_conv2d.forward(
        hidden,
        shared,
        time_embedding,
        *norm,
        eps,
        scale_shift,
        weight,
        bias,
        _pair(padding),
    )[0]


def group_norm_silu_conv2d(
    x: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    padding: int | tuple[int, int] = 0,
) -> torch.Tensor:
    """conv2d(SiLU(GroupNorm(x))), of which backward keeps x and the statistics alone.

    Args:
        x: [rows, C, H, W].
        num_groups: groups of the norm.
        norm_weight: [C] scale of the norm.
        norm_bias: [C] shift of the norm.
        weight: [C_out, C, kernel height, kernel width], stride 1.
        bias: [C_out].
        eps: added to the variance.
        padding: zeros added on each side.

    Returns:
        [rows, C_out, H', W'].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("group_norm_silu_conv2d")
    checks.maps(x=x)
    checks.norm(x.shape[1], num_groups, norm_weight, norm_bias)
    checks.convolution(x.shape[1], weight)
    checks.tensors(x=x, norm_weight=norm_weight, norm_bias=norm_bias)
    x, weight, bias = checks.one_dtype(lower=True, x=x, weight=weight, bias=bias)
    return ops.shared_skip_group_norm_silu_conv2d.forward(
        x, x[:, :0], num_groups, norm_weight, norm_bias, eps, weight, bias, _pair(padding)
    )[0]


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: int | tuple[int, ...] = 0,
) -> torch.Tensor:
    """torch's conv2d with stride 1; on a CPU, maps of few pixels as a matrix product.

    Args:
        x: [rows, C_in, H, W].
        weight: [C_out, C_in, kernel height, kernel width].
        bias: [C_out].
        padding: zeros added on each side.

    Returns:
        [rows, C_out, H', W'].

    Raises:
        ValueError: the weight does not take the channels of x.
    """
    checks = Checks("conv2d")
    checks.maps(x=x)
    checks.convolution(x.shape[1], weight)
    return convolution.conv2d(x, weight, bias, padding)


def split_conv2d(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: int | tuple[int, ...] = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two summands of conv2d(concat(hidden, skip)), stride 1, the skip's computed once.

    A convolution is linear in its input channels, so conv(concat(a_k, s)) is
    conv_hidden(a_k) + conv_skip(s), and the second summand is the same for every timestep.
    The weight is sliced at every call: nothing is cached that could go stale.

    Args:
        hidden: [K*B, C_h, H, W].
        skip: [B, C_s, H, W]; C_s may be 0.
        weight: [C_out, C_h + C_s, kernel height, kernel width].
        bias: [C_out]; it goes into the shared summand.
        padding: zeros added on each side.

    Returns:
        [K*B, C_out, H', W'] and [B, C_out, H', W'], to be added row by row.

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("split_conv2d")
    checks.maps(hidden=hidden, skip=skip)
    checks.rows("hidden", hidden, "skip", skip)
    border = hidden.shape[1]
    checks.convolution(border + skip.shape[1], weight)
    out = convolution.conv2d(hidden, weight, None, padding)
    if skip.shape[1]:
        return out, convolution.conv2d(skip, weight, bias, padding, start=border)
    shared = out.new_zeros(1, out.shape[1], 1, 1)
    if bias is not None:
        shared = shared + bias[:, None, None].to(out.dtype)
    return out, shared.expand(skip.shape[0], *out.shape[1:])


def broadcast_add_group_norm_silu(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    scale_shift: bool = False,
) -> torch.Tensor:
    """SiLU(GroupNorm(hidden_kb + shared_b + time_embedding_kb)).

    With `scale_shift`, SiLU(GroupNorm(hidden + shared) * (1 + scale) + shift), where the time
    embedding holds scale and shift side by side.

    Args:
        hidden: [K*B, C, H, W], or None when no row differs yet (the decoder's first resnet).
        shared: [B, C, H, W].
        time_embedding: [K*B, C], or [K*B, 2 C] with `scale_shift`.
        num_groups: groups of the norm over C channels.
        weight: [C] scale of the norm.
        bias: [C] shift of the norm.
        eps: added to the variance.
        scale_shift: diffusers' `resnet_time_scale_shift="scale_shift"`.

    Returns:
        [K*B, C, H, W].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("broadcast_add_group_norm_silu")
    hidden, shared = _check_broadcast_add(
        checks, hidden, shared, time_embedding, num_groups, weight, bias, scale_shift
    )
    return ops.broadcast_add_group_norm_silu.forward(
        hidden, shared, time_embedding, num_groups, weight, bias, eps, scale_shift
    )[0]


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


def geglu(x: torch.Tensor) -> torch.Tensor:
    """x1 * gelu(x2) with the exact error function (Shazeer 2020, arXiv 2002.05202).

    Args:
        x: [..., 2 C]; x1 is the first half of the last axis, x2 the second.

    Returns:
        [..., C].

    Raises:
        ValueError: the last axis is odd.
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
        projection_weight.ndim == 2 and projection_weight.shape[1] == x.shape[-1],
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
    return ops.geglu_feed_forward.forward(
        x, norm_weight, norm_bias, eps, *linear, not recompute_projection
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


def upsample_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """conv2d(nearest x2 upsampling of x, weight, bias, padding=1), on the small map.

    Every output phase of the doubled map reads a 2 x 2 window of the small one, with taps summed
    beforehand: 2.25 x fewer multiply-adds. Maps too small to gain are upsampled as they are.

    Args:
        x: [rows, C_in, H, W].
        weight: [C_out, C_in, 3, 3]; the taps are summed at every call, nothing is cached.
        bias: [C_out].

    Returns:
        [rows, C_out, 2 H, 2 W].

    Raises:
        ValueError: the weight is no 3 x 3 kernel for the channels of x.
    """
    checks = Checks("upsample_conv2d")
    checks.maps(x=x)
    checks.require(
        weight.shape[1:] == (x.shape[1], 3, 3),
        f"weight must be [C_out, {x.shape[1]}, 3, 3], got {tuple(weight.shape)}",
    )
    x, weight, bias = checks.one_dtype(lower=True, x=x, weight=weight, bias=bias)
    return ops.upsample_conv2d.forward(x, weight, bias)


def timestep_sum_group_norm_silu(
    hidden: torch.Tensor,
    coefficients: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    """sum_k E_k SiLU(GroupNorm(hidden_kb)): combine before the last convolution.

    A convolution is linear, so sum_k E_k conv(a_k) is conv(sum_k E_k a_k) with the bias scaled
    by sum_k E_k: the last convolution runs on B rows.

    Args:
        hidden: [K*B, C, H, W].
        coefficients: [K], E_k.
        num_groups: groups of the norm over C channels.
        weight: [C] scale of the norm.
        bias: [C] shift of the norm.
        eps: added to the variance.

    Returns:
        [B, C, H, W].

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("timestep_sum_group_norm_silu")
    checks.maps(hidden=hidden)
    timesteps = coefficients.shape[0] if coefficients.ndim == 1 else 0
    checks.require(
        timesteps > 0 and hidden.shape[0] % max(timesteps, 1) == 0,
        f"coefficients must be [K] with K a divisor of the {hidden.shape[0]} rows, got "
        f"{tuple(coefficients.shape)}",
    )
    checks.norm(hidden.shape[1], num_groups, weight, bias)
    checks.tensors(hidden=hidden, weight=weight, bias=bias)
    coefficients = coefficients.to(hidden.device)
    return ops.timestep_sum_group_norm_silu.forward(
        hidden, coefficients, num_groups, weight, bias, eps
    )[0]


def one_pass_combine(
    latents: torch.Tensor,
    noise_pred: torch.Tensor,
    latent_coefficient: float,
    noise_coefficients: torch.Tensor,
) -> torch.Tensor:
    """S z + sum_k E_k eps_k: K scheduler steps in one linear map (TiUE, arXiv 2505.21960).

    Args:
        latents: [B, ...], z.
        noise_pred: [K, B, ...], the K model outputs.
        latent_coefficient: S.
        noise_coefficients: [K], E_k.

    Returns:
        [B, ...] in the dtype of latents.

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("one_pass_combine")
    wanted = (*noise_coefficients.shape, *latents.shape)
    checks.require(
        noise_coefficients.ndim == 1 and noise_pred.shape == wanted,
        f"noise_pred must be {wanted} (K, then the shape of latents), got "
        f"{tuple(noise_pred.shape)}",
    )
    checks.tensors(latents=latents, noise_pred=noise_pred)
    noise_coefficients = noise_coefficients.to(latents.device)
    return ops.one_pass_combine.forward(latents, noise_pred, latent_coefficient, noise_coefficients)


def noise_kl(noise_pred: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, var) || N(0, 1)) of every noise map (TiUE, arXiv 2505.21960).

    0.5 (mu^2 + var - 1 - log var), mu and the unbiased var over all of C, H, W.

    Args:
        noise_pred: [..., C, H, W].

    Returns:
        [...], at least float32; the published loss is 0.1 times their sum.

    Raises:
        ValueError: fewer than three axes, or maps of one value (their variance is undefined).
    """
    checks = Checks("noise_kl")
    checks.require(
        noise_pred.ndim >= 3 and noise_pred.shape[-3:].numel() >= 2,
        f"noise_pred must be [..., C, H, W] with two values a map or more, got "
        f"{tuple(noise_pred.shape)}",
    )
    checks.tensors(noise_pred=noise_pred)
    return ops.noise_kl.forward(noise_pred)[0]


def _check_shared_skip(
    checks: Checks,
    hidden: torch.Tensor,
    skip: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> list[torch.Tensor]:
    """hidden and skip in one dtype."""
    checks.maps(hidden=hidden, skip=skip)
    checks.rows("hidden", hidden, "skip", skip)
    checks.require(
        hidden.shape[2:] == skip.shape[2:],
        f"hidden and skip need the same height and width, got {tuple(hidden.shape[2:])} and "
        f"{tuple(skip.shape[2:])}",
    )
    checks.norm(hidden.shape[1] + skip.shape[1], num_groups, weight, bias)
    checks.tensors(hidden=hidden, weight=weight, bias=bias)
    return checks.one_dtype(hidden=hidden, skip=skip)


def _check_broadcast_add(
    checks: Checks,
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale_shift: bool,
) -> list[torch.Tensor]:
    """hidden (or None) and shared in one dtype."""
    checks.maps(shared=shared)
    channels = shared.shape[1]
    wanted = channels * (2 if scale_shift else 1)
    checks.require(
        time_embedding.ndim == 2 and time_embedding.shape[1] == wanted,
        f"time_embedding must be [K*B, {wanted}], got {tuple(time_embedding.shape)}",
    )
    checks.rows("time_embedding", time_embedding, "shared", shared)
    shape = (time_embedding.shape[0], *shared.shape[1:])
    if hidden is not None:
        checks.require(
            hidden.shape == shape,
            f"hidden must be {shape} beside shared {tuple(shared.shape)}, got "
            f"{tuple(hidden.shape)}",
        )
    checks.norm(channels, num_groups, weight, bias)
    checks.tensors(shared=shared, time_embedding=time_embedding, weight=weight, bias=bias)
    return checks.one_dtype(hidden=hidden, shared=shared)


def _pair(padding: int | tuple[int, ...]) -> list[int]:
    return [padding, padding] if isinstance(padding, int) else list(padding)
