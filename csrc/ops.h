// The entry points that bindings.cpp registers, one pair an op; each is explained where it is
// defined, and its schema lives in tiue_kernels/cuda/__init__.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace tiue {

using torch::stable::Tensor;
using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensors4 shared_skip_group_norm_silu_fwd(Tensor hidden, Tensor skip, int64_t num_groups,
                                         Tensor weight, Tensor bias, double eps);
Tensors4 shared_skip_group_norm_silu_bwd(Tensor grad_hidden_out, Tensor grad_skip_out,
                                         Tensor hidden, Tensor skip, int64_t num_groups,
                                         Tensor weight, Tensor bias, Tensor hidden_stats,
                                         Tensor skip_stats);
Tensors2 cross_timestep_attention_fwd(Tensor query, Tensor key, Tensor value, int64_t num_heads,
                                      double scale, std::optional<Tensor> attention_bias);
Tensors4 cross_timestep_attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                                      int64_t num_heads, double scale,
                                      std::optional<Tensor> attention_bias, Tensor out,
                                      Tensor logsumexp, bool needs_bias_grad);

}  // namespace tiue
