"""x + gate * y over K timesteps, x of B rows where all timesteps share it."""

import torch

from tiue_kernels.reference.adaptive_layer_norm import by_timestep, timesteps_of


def gated_residual_fwd(x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    branch = y.unflatten(0, (timesteps_of(gate, x), len(x)))  # (K, R, N, C)
    return (x + by_timestep(gate.to(x.dtype), x) * branch).flatten(0, 1)


def gated_residual_bwd(
    grad_out: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_y = grad_out * gate.to(grad_out.dtype).unsqueeze(1)
    grad_gate = torch.einsum("rnc,rnc->rc", grad_out.to(dtype), y.to(dtype)).to(gate.dtype)
    timesteps = timesteps_of(gate, x)
    grad_x = grad_out.clone()
    if timesteps != 1:
        grad_x = grad_out.unflatten(0, (timesteps, len(x))).sum(0)
    return grad_x, grad_gate, grad_y
