"""The public operators: shapes checked, defaults filled in, handed to the implementation.

K is the number of decoder timesteps, B the batch. K*B rows are timestep-major (row k * B + b);
a tensor with B rows is shared by all timesteps. Every function is differentiable in every
floating-point tensor, for float64, float32, float16 and bfloat16, contiguous and channels_last;
statistics and sums over timesteps are accumulated in float32 (float64 for float64 input).
"""

import torch

from tiue_kernels import convolution
from tiue_kernels.reference.broadcast_add_group_norm_silu import broadcast_add_group_norm_silu_fwd
from tiue_kernels.reference.cross_timestep_attention import cross_timestep_attention_fwd
from tiue_kernels.reference.geglu import geglu_fwd
from tiue_kernels.reference.geglu_feed_forward import geglu_feed_forward_fwd
from tiue_kernels.reference.noise_kl import noise_kl_fwd
from tiue_kernels.reference.one_pass_combine import one_pass_combine_fwd
from tiue_kernels.reference.shared_skip_group_norm_silu import shared_skip_group_norm_silu_fwd
from tiue_kernels.reference.timestep_sum_group_norm_silu import timestep_sum_group_norm_silu_fwd
from tiue_kernels.reference.upsample_conv2d import upsample_conv2d_fwd


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
    _check_rows("hidden", hidden, "skip", skip)
    if hidden.shape[2:] != skip.shape[2:]:
        raise ValueError(
            f"hidden and skip need the same height and width, got {tuple(hidden.shape[2:])} and "
            f"{tuple(skip.shape[2:])}"
        )
    _check_norm(hidden.shape[1] + skip.shape[1], num_groups, weight, bias)
    return shared_skip_group_norm_silu_fwd(hidden, skip, num_groups, weight, bias, eps)


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
    if weight.ndim != 4 or x.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be [C_out, {x.shape[1]}, height, width] for x of {tuple(x.shape)}, got "
            f"{tuple(weight.shape)}"
        )
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
    _check_rows("hidden", hidden, "skip", skip)
    border = hidden.shape[1]
    if weight.shape[1] != border + skip.shape[1]:
        raise ValueError(
            f"weight takes {weight.shape[1]} channels, hidden and skip have "
            f"{border} + {skip.shape[1]}"
        )
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
    channels = shared.shape[1]
    wanted = channels * (2 if scale_shift else 1)
    if time_embedding.ndim != 2 or time_embedding.shape[1] != wanted:
        raise ValueError(
            f"time_embedding must be [K*B, {wanted}], got {tuple(time_embedding.shape)}"
        )
    _check_rows("time_embedding", time_embedding, "shared", shared)
    if hidden is not None and hidden.shape != (time_embedding.shape[0], *shared.shape[1:]):
        raise ValueError(
            f"hidden must be {(time_embedding.shape[0], *shared.shape[1:])} beside shared "
            f"{tuple(shared.shape)}, got {tuple(hidden.shape)}"
        )
    _check_norm(channels, num_groups, weight, bias)
    return broadcast_add_group_norm_silu_fwd(
        hidden, shared, time_embedding, num_groups, weight, bias, eps, scale_shift
    )


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
    _check_rows("query", query, "key", key)
    if key.shape != value.shape:
        raise ValueError(
            f"key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[2] != key.shape[2] or query.shape[2] % num_heads:
        raise ValueError(
            f"query and key need the same channels, a multiple of {num_heads} heads, got "
            f"{query.shape[2]} and {key.shape[2]}"
        )
    if attention_bias is not None and attention_bias.shape != (key.shape[0], 1, key.shape[1]):
        raise ValueError(
            f"attention_bias must be {(key.shape[0], 1, key.shape[1])}, got "
            f"{tuple(attention_bias.shape)}"
        )
    if scale is None:
        scale = (query.shape[2] // num_heads) ** -0.5
    return cross_timestep_attention_fwd(query, key, value, num_heads, scale, attention_bias)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """x1 * gelu(x2) with the exact error function (Shazeer 2020, arXiv 2002.05202).

    Args:
        x: [..., 2 C]; x1 is the first half of the last axis, x2 the second.

    Returns:
        [..., C].

    Raises:
        ValueError: the last axis is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"geglu halves the last axis, which is odd: {x.shape[-1]}")
    return geglu_fwd(x)


def geglu_feed_forward(
    x: torch.Tensor,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """linear(geglu(linear(x))): a transformer block's feed-forward.

    Args:
        x: [..., C], two axes at least.
        projection_weight: [2 D, C].
        projection_bias: [2 D].
        weight: [C_out, D].
        bias: [C_out].

    Returns:
        [..., C_out].

    Raises:
        ValueError: the shapes do not fit together.
    """
    if x.ndim < 2 or projection_weight.shape[1:] != x.shape[-1:]:
        raise ValueError(
            f"projection_weight must be [2 D, C] for x [..., C] of {tuple(x.shape)}, got "
            f"{tuple(projection_weight.shape)}"
        )
    if weight.ndim != 2 or 2 * weight.shape[1] != projection_weight.shape[0]:
        raise ValueError(
            f"weight must be [C_out, D], half the {projection_weight.shape[0]} rows of "
            f"projection_weight, got {tuple(weight.shape)}"
        )
    return geglu_feed_forward_fwd(x, projection_weight, projection_bias, weight, bias)


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
    if x.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"weight must be [C_out, {x.shape[1]}, 3, 3] for x of {tuple(x.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    return upsample_conv2d_fwd(x, weight, bias)


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
    if coefficients.ndim != 1 or not len(coefficients) or hidden.shape[0] % len(coefficients):
        raise ValueError(
            f"coefficients must be [K] with K a divisor of the {hidden.shape[0]} rows, got "
            f"{tuple(coefficients.shape)}"
        )
    _check_norm(hidden.shape[1], num_groups, weight, bias)
    coefficients = coefficients.to(hidden.device)
    return timestep_sum_group_norm_silu_fwd(hidden, coefficients, num_groups, weight, bias, eps)


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
    if noise_pred.shape != (*noise_coefficients.shape, *latents.shape):
        raise ValueError(
            f"noise_pred must be {(*noise_coefficients.shape, *latents.shape)} (K, then the "
            f"shape of latents), got {tuple(noise_pred.shape)}"
        )
    noise_coefficients = noise_coefficients.to(latents.device)
    return one_pass_combine_fwd(latents, noise_pred, latent_coefficient, noise_coefficients)


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
    if noise_pred.ndim < 3 or noise_pred.shape[-3:].numel() < 2:
        raise ValueError(
            f"noise_pred must be [..., C, H, W] with two values a map or more, got "
            f"{tuple(noise_pred.shape)}"
        )
    return noise_kl_fwd(noise_pred)


def _check_rows(name: str, rows: torch.Tensor, shared_name: str, shared: torch.Tensor) -> None:
    """Refuse rows that are no whole number of timesteps over the shared rows."""
    batch = shared.shape[0]
    if rows.shape[0] % batch if batch else rows.shape[0]:
        raise ValueError(
            f"{name} has {rows.shape[0]} rows, which is no multiple of the {batch} rows of "
            f"{shared_name}: it must have K*B rows, timestep-major"
        )


def _check_norm(channels: int, num_groups: int, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if channels % num_groups:
        raise ValueError(f"{channels} channels do not divide into {num_groups} groups")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"weight and bias of the norm must be ({channels},), got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
