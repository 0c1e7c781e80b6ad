// What the library has once: which form this computer runs, and the loop over threads.
#include <cstdint>

#include "vector.h"

#ifndef TIUE_VERSION
#error "TIUE_VERSION is the package's version, a string: see tiue_kernels/build.py"
#endif

namespace {

int32_t plain_loop(int64_t begin, int64_t end, int64_t, Task task, void* context) {
  task(begin, end, context);
  return 0;
}

}  // namespace

ParallelFor tiue_parallel_loop = plain_loop;

TIUE_EXPORT void tiue_use_threads(ParallelFor loop) { tiue_parallel_loop = loop; }

// The version of the package that it was compiled for.
TIUE_EXPORT const char* tiue_version() { return TIUE_VERSION; }

// The widest form that runs here.
TIUE_EXPORT const char* tiue_widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return wide ? "avx512" : "avx2";
  }
#endif
  return "portable";
}
