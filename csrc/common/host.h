// Runs kernels on the CPU, for tests on machines without a GPU: one fiber a thread.
//
// A block's threads take turns on one CPU thread. `__syncthreads`, shuffles and the matrix
// instructions park a fiber until its block or warp has arrived. Shared memory is NaN when a block
// starts; asynchronous copies land when they are waited for, never sooner. Every access is checked
// (host_memory.h): races, whatever the order that they ran in, shared memory that nobody wrote,
// memory of no tensor, addresses that a vector must not have. A barrier that some threads never
// reach is an error too. TIUE_HOST_SEED shuffles lanes, warps and blocks.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "host_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace tiue::host {

constexpr int kSlotBytes = 64;

// What the lanes of each warp hand one another. Two buffers take turns: a lane can write the next
// one while others still read this one, and nobody gets further ahead than that.
struct Slots {
  alignas(16) unsigned char bytes[kMaxThreads / 32][2][32][kSlotBytes];
};
extern Slots slots;

void block_barrier();
// Waits for the warp; `orders` its accesses before and after, as __syncwarp does.
void warp_barrier(bool orders);
int next_buffer();  // of `slots`, for the thread that runs

// Copies of 16 bytes, or zeros; they land when they are waited for.
void start_copy(void* to, const void* from, bool valid);
void commit_copies();
void land_copies(size_t keep_groups);

struct Launch {
  void (*body)(const void* kernel, const void* params);
  const void* kernel;
  const void* params;
  size_t params_bytes;
};
void run(const Launch& launch, int64_t blocks, int threads, size_t shared_bytes);

// What every lane of the warp handed in.
template <typename T>
struct Lanes {
  const unsigned char (*slots)[kSlotBytes];
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof(T));
    return value;
  }
};

template <typename T>
Lanes<T> exchange(const T& value) {
  static_assert(sizeof(T) <= kSlotBytes);
  auto& buffer = slots.bytes[memory.current / 32][next_buffer()];
  std::memcpy(buffer[memory.current % 32], &value, sizeof(T));
  warp_barrier(false);
  return {buffer};
}

template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes,
            const Params& params) {
  auto body = [](const void* kernel, const void* params) {
    (*static_cast<void (*const*)(Params)>(kernel))(*static_cast<const Params*>(params));
  };
  run({body, &kernel, &params, sizeof(params)}, blocks, threads, shared_bytes);
}

}  // namespace tiue::host

inline void __syncthreads() { tiue::host::block_barrier(); }
inline void __syncwarp() { tiue::host::warp_barrier(true); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return tiue::host::exchange(value)[lane % 32];
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  int lane = static_cast<int>(threadIdx.x) % 32;
  return tiue::host::exchange(value)[lane ^ mask];
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
