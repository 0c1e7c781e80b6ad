// Registration and nothing else.
#include <torch/csrc/stable/library.h>

#include "ops.h"

#ifdef TIUE_HOST
#define TIUE_DISPATCH_KEY CPU
#else
#define TIUE_DISPATCH_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(tiue_cuda, TIUE_DISPATCH_KEY, m) {
  m.impl("shared_skip_group_norm_silu_fwd", TORCH_BOX(&tiue::shared_skip_group_norm_silu_fwd));
  m.impl("shared_skip_group_norm_silu_bwd", TORCH_BOX(&tiue::shared_skip_group_norm_silu_bwd));
  m.impl("cross_timestep_attention_fwd", TORCH_BOX(&tiue::cross_timestep_attention_fwd));
  m.impl("cross_timestep_attention_bwd", TORCH_BOX(&tiue::cross_timestep_attention_bwd));
}
