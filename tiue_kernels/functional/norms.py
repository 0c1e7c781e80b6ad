"""The norms of a resnet over K timesteps: skip, time embedding and coefficients fused in."""

import torch

from tiue_kernels import ops
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
    hidden, skip = check_shared_skip(checks, hidden, skip, num_groups, weight, bias)
    return ops.shared_skip_group_norm_silu.forward(hidden, skip, num_groups, weight, bias, eps)[:2]


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
    hidden, shared = check_broadcast_add(
        checks, hidden, shared, time_embedding, num_groups, weight, bias, scale_shift
    )
    return ops.broadcast_add_group_norm_silu.forward(
        hidden, shared, time_embedding, num_groups, weight, bias, eps, scale_shift
    )[0]


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
    if timesteps == 0 or hidden.shape[0] % timesteps:
        # Not `require`: torch.compile would take the number of rows, once in a text, for fixed.
        checks.fail(
            f"coefficients must be [K] with K a divisor of the {hidden.shape[0]} rows, got "
            f"{tuple(coefficients.shape)}"
        )
    checks.norm(hidden.shape[1], num_groups, weight, bias)
    checks.tensors(hidden=hidden, weight=weight, bias=bias)
    coefficients = coefficients.to(hidden.device)
    return ops.timestep_sum_group_norm_silu.forward(
        hidden, coefficients, num_groups, weight, bias, eps
    )[0]


def check_shared_skip(
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


def check_broadcast_add(
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
