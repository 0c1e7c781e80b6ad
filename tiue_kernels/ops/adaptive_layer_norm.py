"""LayerNorm(x) * (1 + scale) + shift, tokens of B rows normalised once for K*B rows of scales."""

from collections.abc import Mapping
from typing import Any

import torch

from tiue_kernels.dispatch import ANYWHERE, Capability
from tiue_kernels.ops._library import declare, statistics_dtype
from tiue_kernels.reference.adaptive_layer_norm import adaptive_layer_norm_fwd

MOST_CHANNELS = 8192  # a program holds a token in its registers


def limit(direction: str, args: Mapping[str, Any], _capability: tuple[int, int]) -> str | None:
    channels = args["x"].shape[-1]
    return (
        f"{channels} channels are more than {MOST_CHANNELS}" if channels > MOST_CHANNELS else None
    )


def _fake(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    stats = x.new_empty(2, *x.shape[:-1], dtype=statistics_dtype(x.dtype))
    return x.new_empty(scale.shape[0], *x.shape[1:]), stats


forward, backward = declare(
    "adaptive_layer_norm",
    "(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor out, Tensor stats)",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor shift, Tensor stats)"
    " -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)",
    fake=_fake,
    kernels={"triton": Capability(limit=limit), "reference": ANYWHERE},
    decomposition=adaptive_layer_norm_fwd,
)
