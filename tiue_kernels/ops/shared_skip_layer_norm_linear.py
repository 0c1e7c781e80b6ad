"""linear(LayerNorm(concat(hidden, skip))), the skip's half of norm and product once for all.

Backward needs the inputs alone: what the products read is computed again, and not kept.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from tiue_kernels.dispatch import ANYWHERE, Capability
from tiue_kernels.ops._library import declare
from tiue_kernels.ops.adaptive_layer_norm import MOST_CHANNELS


def _limit(direction: str, args: Mapping[str, Any], _capability: tuple[int, int]) -> str | None:
    most = max(args["hidden"].shape[-1], args["skip"].shape[-1], args["weight"].shape[0])
    return f"{most} channels are more than {MOST_CHANNELS}" if most > MOST_CHANNELS else None


def _fake(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:2], weight.shape[0])


def _fake_backward(
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    skip: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    inputs = (hidden, skip, norm_weight, norm_bias, weight)
    return *(own.new_empty(own.shape) for own in inputs), weight.new_empty(weight.shape[0])


def _decomposed(
    hidden: torch.Tensor,
    skip: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    skip = skip.repeat(hidden.shape[0] // skip.shape[0], 1, 1)
    joined = torch.cat([hidden, skip], dim=-1)
    norm = (norm_weight.to(joined.dtype), norm_bias.to(joined.dtype), eps)
    return F.linear(F.layer_norm(joined, joined.shape[-1:], *norm), weight, bias)


_INPUTS = (
    "Tensor hidden, Tensor skip, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight,"
    " Tensor? bias"
)

forward, backward = declare(
    "shared_skip_layer_norm_linear",
    f"({_INPUTS}) -> Tensor out",
    f"(Tensor grad_out, {_INPUTS}) -> (Tensor grad_hidden, Tensor grad_skip,"
    " Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake,
    fake_backward=_fake_backward,
    kernels={"triton": Capability(limit=_limit), "reference": ANYWHERE},
    decomposition=_decomposed,
)
