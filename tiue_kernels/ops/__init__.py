"""The operators as torch knows them: one file an operator, with everything that is said of it.

In every file `forward` and `backward` run `torch.ops.tiue.<op>_fwd` and `_bwd`.
"""

from tiue_kernels.ops import (
    adaptive_feed_forward,
    adaptive_layer_norm,
    adaptive_layer_norm_linear,
    broadcast_add_group_norm_silu,
    broadcast_add_group_norm_silu_conv2d,
    conv2d,
    cross_timestep_attention,
    gated_residual,
    geglu,
    geglu_feed_forward,
    group_norm_linear,
    group_norm_tokens,
    layer_norm_linear,
    linear_gated_residual,
    noise_kl,
    one_pass_combine,
    shared_skip_group_norm_silu,
    shared_skip_group_norm_silu_conv2d,
    shared_skip_layer_norm_linear,
    timestep_sum_group_norm_silu,
    upsample_conv2d,
)

__all__ = [
    "adaptive_feed_forward",
    "adaptive_layer_norm",
    "adaptive_layer_norm_linear",
    "broadcast_add_group_norm_silu",
    "broadcast_add_group_norm_silu_conv2d",
    "conv2d",
    "cross_timestep_attention",
    "gated_residual",
    "geglu",
    "geglu_feed_forward",
    "group_norm_linear",
    "group_norm_tokens",
    "layer_norm_linear",
    "linear_gated_residual",
    "noise_kl",
    "one_pass_combine",
    "shared_skip_group_norm_silu",
    "shared_skip_group_norm_silu_conv2d",
    "shared_skip_layer_norm_linear",
    "timestep_sum_group_norm_silu",
    "upsample_conv2d",
]
