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
    def run(tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(
            geglu_fwd(F.linear(tokens, projection_weight, projection_bias)), weight, bias
        )

    # A compiled graph would hold every chunk apart, and one more for each size of a batch.
    in_one_piece = torch.is_grad_enabled() or torch.compiler.is_compiling()
    tokens = x.flatten(0, -2)
    if in_one_piece or x.device.type != "cpu" or len(tokens) <= CHUNK:
        return run(x)
    return torch.cat([run(chunk) for chunk in tokens.split(CHUNK)]).view(*x.shape[:-1], -1)
