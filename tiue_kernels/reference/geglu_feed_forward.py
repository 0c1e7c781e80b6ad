"""linear(geglu(linear(x))): a transformer block's feed-forward."""

import torch
import torch.nn.functional as F

from tiue_kernels.reference.geglu import geglu_fwd

# On a CPU, tokens a chunk where nothing is kept for backward: the projection stays in the cache.
# 16,384 tokens of 320 channels on two cores: 0.36 s against 0.50 s in one piece; 128: 0.58 s.
CHUNK = 1024


def geglu_feed_forward_fwd(
    x: torch.Tensor,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    tokens = x.flatten(0, -2)
    if x.device.type != "cpu" or torch.is_grad_enabled() or len(tokens) <= CHUNK:
        return F.linear(geglu_fwd(F.linear(x, projection_weight, projection_bias)), weight, bias)
    chunks = [
        F.linear(geglu_fwd(F.linear(chunk, projection_weight, projection_bias)), weight, bias)
        for chunk in tokens.split(CHUNK)
    ]
    return torch.cat(chunks).view(*x.shape[:-1], weight.shape[0])
