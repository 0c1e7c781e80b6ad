// Registration and nothing else.
#include <torch/csrc/stable/library.h>

#include "ops.h"

#ifdef TIUE_HOST
#define TIUE_DISPATCH_KEY CPU
#else
#define TIUE_DISPATCH_KEY CUDA
#endif

// Of the operators; a copy of the package has one of its own (integrations/kernels).
#ifndef TIUE_NAMESPACE
#define TIUE_NAMESPACE tiue_cuda
#endif

STABLE_TORCH_LIBRARY_IMPL(TIUE_NAMESPACE, TIUE_DISPATCH_KEY, m) {
  m.impl("shared_skip_group_norm_silu_fwd", TORCH_BOX(&tiue::shared_skip_group_norm_silu_fwd));
  m.impl("shared_skip_group_norm_silu_bwd", TORCH_BOX(&tiue::shared_skip_group_norm_silu_bwd));
  m.impl("cross_timestep_attention_fwd", TORCH_BOX(&tiue::cross_timestep_attention_fwd));
  m.impl("cross_timestep_attention_bwd", TORCH_BOX(&tiue::cross_timestep_attention_bwd));
}
