// What kernels are written against: the types and primitives that a GPU and the host both have.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef TIUE_HOST
#include "host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace tiue {

#ifdef TIUE_HOST
using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;
#else
using Half = __half;
using BFloat16 = __nv_bfloat16;
#endif

constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
#ifndef TIUE_HOST
  if constexpr (sizeof(T) == 2) {  // the constructors round the same, but not in one instruction
    if constexpr (std::is_same_v<T, Half>) return __float2half_rn(x);
    if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(x);
  }
#endif
  return static_cast<T>(x);
}

// kSize values that move in one load or store.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T data[kSize];
};

template <int kSize, typename T>
__device__ __forceinline__ Vector<T, kSize> load_vector(const T* pointer) {
#ifdef TIUE_HOST
  host::check_alignment(pointer, sizeof(Vector<T, kSize>), "a load");
#endif
  return *reinterpret_cast<const Vector<T, kSize>*>(pointer);
}

template <int kSize, typename T>
__device__ __forceinline__ void store_vector(T* pointer, const Vector<T, kSize>& vector) {
#ifdef TIUE_HOST
  host::check_alignment(pointer, sizeof(Vector<T, kSize>), "a store");
#endif
  *reinterpret_cast<Vector<T, kSize>*>(pointer) = vector;
}

// The block's shared memory: all of it is asked for at the launch.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef TIUE_HOST
  return host::memory.shared;
#else
  extern __shared__ __align__(128) unsigned char shared_arena[];
  return shared_arena;
#endif
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(kFullWarp, value, mask);
  return value;
}

// Parameters of a norm come in any dtype, whatever the maps are.
struct FloatArray {
  const void* data;
  int bytes;  // 4 float32, 2 float16, -2 bfloat16

  __device__ __forceinline__ float operator[](int i) const {
    if (bytes == 4) return static_cast<const float*>(data)[i];
    if (bytes == 2) return to_float(static_cast<const Half*>(data)[i]);
    return to_float(static_cast<const BFloat16*>(data)[i]);
  }
};

// exp and division that round once less suffice where the result is rounded to 16 bits anyway.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace tiue
