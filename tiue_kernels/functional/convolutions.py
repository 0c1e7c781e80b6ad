"""Convolutions of shared and of own rows, alone and behind their norms."""

import torch
import torch.nn.functional as F

from tiue_kernels import dispatch, ops
from tiue_kernels.checks import Checks
from tiue_kernels.functional.norms import check_broadcast_add, check_shared_skip
from tiue_kernels.layout import memory_format

# Public operators that are others in disguise, with what runs in them.
dispatch.MADE_OF["split_conv2d"] = ("conv2d",)
dispatch.MADE_OF["group_norm_silu_conv2d"] = ("shared_skip_group_norm_silu", "conv2d")


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    padding: int | tuple[int, ...] = 0,
) -> torch.Tensor:
    """torch's conv2d with stride 1, by the algorithm that is fastest on the device.

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
    x, weight, bias = checks.one_dtype(lower=True, x=x, weight=weight, bias=bias)
    if _is_product(x, weight, padding):
        return product_of_pixels(x, weight, bias)
    return ops.conv2d.forward(x, weight, bias, _pair(padding), 0)


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

    Args:
        hidden: [K*B, C_h, H, W].
        skip: [B, C_s, H, W]; C_s may be 0.
        weight: [C_out, C_h + C_s, kernel height, kernel width].
        bias: [C_out]; it goes into the shared summand, where something is shared.
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
    hidden, skip, weight, bias = checks.one_dtype(
        lower=True, hidden=hidden, skip=skip, weight=weight, bias=bias
    )
    pads = _pair(padding)
    if skip.shape[1] and _is_product(hidden, weight, padding):
        return (
            product_of_pixels(hidden, weight[:, :border], None),
            product_of_pixels(skip, weight[:, border:], bias),
        )
    if skip.shape[1] and not dispatch.is_reference("split_conv2d"):
        out = ops.conv2d.forward(hidden, weight, None, pads, 0)
        return out, ops.conv2d.forward(skip, weight, bias, pads, border)
    if skip.shape[1]:
        repeated = skip.repeat(hidden.shape[0] // max(skip.shape[0], 1), 1, 1, 1)
        hidden = torch.cat([hidden, repeated], dim=1)
    out = ops.conv2d.forward(hidden, weight, bias, pads, 0)
    return out, out.new_zeros(1).expand(skip.shape[0], *out.shape[1:])


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
        [K*B, C_out, H', W'] and [B, C_out, H', W'], to be added row by row. Gradients are right for
        what depends on the sum alone: how it is split is the backend's affair, and the reference
        gives it whole beside zeros.

    Raises:
        ValueError: the shapes do not fit together.
    """
    checks = Checks("shared_skip_group_norm_silu_conv2d")
    hidden, skip = check_shared_skip(checks, hidden, skip, num_groups, norm_weight, norm_bias)
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
    check_broadcast_add(checks, hidden, shared, time_embedding, *norm, scale_shift)
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


def upsample_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """conv2d(nearest x2 upsampling of x, weight, bias, padding=1), on the small map.

    Every output phase of the doubled map reads a 2 x 2 window of the small one, with taps summed
    beforehand: 2.25 x fewer multiply-adds. Maps too small to gain are upsampled as they are.

    Args:
        x: [rows, C_in, H, W].
        weight: [C_out, C_in, 3, 3].
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


def _is_product(x: torch.Tensor, weight: torch.Tensor, padding: int | tuple[int, ...]) -> bool:
    """Whether a convolution is a product of pixels that lie as tokens, on a GPU."""
    return (
        x.is_cuda
        and weight.shape[2:] == (1, 1)
        and set(_pair(padding)) == {0}
        and memory_format(x) == torch.channels_last
        and not dispatch.is_reference("conv2d")
    )


def product_of_pixels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A 1 x 1 convolution of a map in channels_last as one matrix product.

    cuDNN would copy a slice of the weight, and torch adds the bias in a kernel of its own; a
    product reads the slice where it lies and adds the bias as it writes.

    Args:
        x: [rows, C, H, W].
        weight: [C_out, C, 1, 1], or a slice of its input channels.
        bias: [C_out].

    Returns:
        [rows, C_out, H, W] in channels_last.
    """
    return F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)


def _pair(padding: int | tuple[int, ...]) -> list[int]:
    return [padding, padding] if isinstance(padding, int) else list(padding)
