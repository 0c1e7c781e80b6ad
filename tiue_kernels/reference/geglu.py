"""x1 * gelu(x2) of the two halves of the last axis, exact erf."""

import torch
import torch.nn.functional as F


def geglu_fwd(x: torch.Tensor) -> torch.Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return (hidden * F.gelu(gate)).contiguous()


def geglu_bwd(grad_out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    hidden, gate = x.to(dtype).chunk(2, dim=-1)
    grad = grad_out.to(dtype)
    grad_x = x.new_empty(x.shape)
    grad_hidden, grad_gate = grad_x.chunk(2, dim=-1)
    grad_hidden.copy_(F.gelu(gate) * grad)
    grad_gate.copy_(torch.ops.aten.gelu_backward(grad * hidden, gate))
    return grad_x
