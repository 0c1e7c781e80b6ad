"""x + gate * y of a transformer block, x of B rows where all K timesteps share it."""

import torch

from tiue_kernels.dispatch import ANYWHERE, Capability
from tiue_kernels.ops._library import declare
from tiue_kernels.ops.adaptive_layer_norm import limit
from tiue_kernels.reference.gated_residual import gated_residual_fwd


def _fake(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape)


forward, backward = declare(
    "gated_residual",
    "(Tensor x, Tensor gate, Tensor y) -> Tensor out",
    "(Tensor grad_out, Tensor x, Tensor gate, Tensor y)"
    " -> (Tensor grad_x, Tensor grad_gate, Tensor grad_y)",
    fake=_fake,
    kernels={"triton": Capability(limit=limit), "reference": ANYWHERE},
    decomposition=gated_residual_fwd,
)
