"""Sum, norm, SiLU and convolution.

Backward needs the inputs and the statistics alone: the normalised map is computed again, in one
elementwise kernel, and not kept.
"""

import torch

from tiue_kernels.layout import convolved_like
from tiue_kernels.ops import broadcast_add_group_norm_silu as norm
from tiue_kernels.ops import conv2d
from tiue_kernels.ops._library import declare, statistics_dtype


def _run_forward(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    scale_shift: bool,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    active, stats = norm.forward(
        hidden, shared, time_embedding, num_groups, norm_weight, norm_bias, eps, scale_shift
    )
    return conv2d.forward(active, weight, bias, padding, 0), stats


def _fake(
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    scale_shift: bool,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = time_embedding.shape[0]
    size = conv2d.convolved_size(shared.shape[2:], weight, padding)
    return (
        convolved_like(shared if hidden is None else hidden, weight, rows, *size),
        shared.new_empty(2, rows, num_groups, dtype=statistics_dtype(shared.dtype)),
    )


def _run_backward(
    grad_out: torch.Tensor,
    hidden: torch.Tensor | None,
    shared: torch.Tensor,
    time_embedding: torch.Tensor,
    num_groups: int,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    scale_shift: bool,
    weight: torch.Tensor,
    stats: torch.Tensor,
    padding: list[int],
    output_mask: list[bool],
) -> tuple[torch.Tensor, ...]:
    inputs = (hidden, shared, time_embedding, num_groups, norm_weight, norm_bias)
    active, _ = norm.forward(*inputs, eps, scale_shift)
    grad_active, *grads = conv2d.backward(grad_out, active, weight, padding, 0, output_mask)
    if not output_mask[0]:
        return *(shared.new_empty(0) for _ in range(5)), *grads
    return *norm.backward(grad_active, *inputs, scale_shift, stats), *grads


forward, backward = declare(
    "broadcast_add_group_norm_silu_conv2d",
    "(Tensor? hidden, Tensor shared, Tensor time_embedding, int num_groups, Tensor norm_weight,"
    " Tensor norm_bias, float eps, bool scale_shift, Tensor weight, Tensor? bias, int[2] padding)"
    " -> (Tensor out, Tensor stats)",
    "(Tensor grad_out, Tensor? hidden, Tensor shared, Tensor time_embedding, int num_groups,"
    " Tensor norm_weight, Tensor norm_bias, float eps, bool scale_shift, Tensor weight,"
    " Tensor stats, int[2] padding, bool[3] output_mask)"
    " -> (Tensor grad_hidden, Tensor grad_shared, Tensor grad_time_embedding,"
    " Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake,
    wanted=[
        ("hidden", "shared", "time_embedding", "norm_weight", "norm_bias"),
        ("weight",),
        ("bias",),
    ],
    run=(_run_forward, _run_backward),
    made_of=("broadcast_add_group_norm_silu", "conv2d"),
    decomposition=_run_forward,
)
