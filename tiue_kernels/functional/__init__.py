"""The public operators: shapes and dtypes checked, defaults filled in, handed to the operator.

K is the number of decoder timesteps, B the batch. K*B rows are timestep-major (row k * B + b);
a tensor with B rows is shared by all timesteps. Every function is differentiable, once, in every
floating-point tensor, for float64, float32, float16 and bfloat16, contiguous and channels_last;
statistics and sums over timesteps are accumulated in float32 (float64 for float64 input). Data
tensors of a call share one dtype; scale and shift of a norm, time embedding and coefficients may
be of another. Under autocast data are brought to one dtype, as torch's own operators do.

Every function raises ValueError for shapes and devices that do not fit together, TypeError for
dtypes, and BackendError where a forced backend cannot serve the call.
"""

from tiue_kernels.functional.branches import (
    adaptive_feed_forward,
    adaptive_layer_norm_linear,
    linear_gated_residual,
)
from tiue_kernels.functional.convolutions import (
    broadcast_add_group_norm_silu_conv2d,
    conv2d,
    group_norm_silu_conv2d,
    shared_skip_group_norm_silu_conv2d,
    split_conv2d,
    upsample_conv2d,
)
from tiue_kernels.functional.norms import (
    broadcast_add_group_norm_silu,
    shared_skip_group_norm_silu,
    timestep_sum_group_norm_silu,
)
from tiue_kernels.functional.outputs import noise_kl, one_pass_combine
from tiue_kernels.functional.transformers import (
    adaptive_layer_norm,
    cross_timestep_attention,
    gated_residual,
    geglu,
    geglu_feed_forward,
    group_norm_linear,
    group_norm_tokens,
    layer_norm_linear,
    shared_skip_layer_norm_linear,
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
    "group_norm_silu_conv2d",
    "group_norm_tokens",
    "layer_norm_linear",
    "linear_gated_residual",
    "noise_kl",
    "one_pass_combine",
    "shared_skip_group_norm_silu",
    "shared_skip_group_norm_silu_conv2d",
    "shared_skip_layer_norm_linear",
    "split_conv2d",
    "timestep_sum_group_norm_silu",
    "upsample_conv2d",
]
