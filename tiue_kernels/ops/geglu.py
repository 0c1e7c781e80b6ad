"""x1 * gelu(x2) of the two halves of the last axis."""

import torch

from tiue_kernels.dispatch import ANYWHERE, KERNEL
from tiue_kernels.ops._library import declare
from tiue_kernels.reference.geglu import geglu_fwd


def _fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


forward, backward = declare(
    "geglu",
    "(Tensor x) -> Tensor out",
    "(Tensor grad_out, Tensor x) -> Tensor grad_x",
    fake=_fake,
    kernels={"triton": KERNEL, "reference": ANYWHERE},
    decomposition=geglu_fwd,
)
