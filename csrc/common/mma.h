// Warp-wide matrix products on tiles in shared memory.
//
// An accumulator holds 16 x 8 values a warp as mma.sync does: with g = lane / 4 and t = lane % 4 a
// lane has (row g, columns 2t and 2t + 1) and (row g + 8, the same columns). float16 and bfloat16
// go through tensor cores, with float32 sums. float32 goes through plain FMAs on the same layout:
// TF32 would keep 10 bits of it.
#pragma once

#include "device.h"

namespace tiue {

template <typename T>
struct Tile {
  // 16 bytes of padding a row: the 8 rows of a matrix lie in different banks.
  static constexpr int kPad = 16 / sizeof(T);
  static constexpr int kChunk = 16 / sizeof(T);
};

#ifdef TIUE_HOST

inline void copy_async(void* to, const void* from, bool valid) {
  host::start_copy(to, from, valid);
}

inline void commit_copies() { host::commit_copies(); }

template <int kKeep>
void wait_for_copies() {
  host::land_copies(kKeep);
}

template <bool kTranspose>
void load_matrices(uint32_t (&out)[4], const void* row) {
  host::check_alignment(row, 16, "a matrix row");
  auto rows = host::exchange(row);
  int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      int r = kTranspose ? lane % 4 * 2 + j : lane / 4;
      int c = kTranspose ? lane / 4 : lane % 4 * 2 + j;
      std::memcpy(&pair[j], static_cast<const uint16_t*>(rows[8 * i + r]) + c, 2);
    }
    std::memcpy(&out[i], pair, 4);
  }
}

template <typename T>
void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    float a[4][2], b[2][2];
  } mine;
  auto unpack = [](uint32_t bits, float (&to)[2]) {
    T pair[2];
    std::memcpy(pair, &bits, 4);
    to[0] = to_float(pair[0]);
    to[1] = to_float(pair[1]);
  };
  for (int i = 0; i < 4; ++i) unpack(a[i], mine.a[i]);
  for (int i = 0; i < 2; ++i) unpack(b[i], mine.b[i]);
  auto lanes = host::exchange(mine);
  int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int quad = 0; quad < 4; ++quad) {
    Fragments rows = lanes[g * 4 + quad], left = lanes[2 * t * 4 + quad],
              right = lanes[(2 * t + 1) * 4 + quad];
    for (int upper = 0; upper < 2; ++upper) {
      for (int i = 0; i < 2; ++i) {
        sum[0] += rows.a[2 * upper][i] * left.b[upper][i];
        sum[1] += rows.a[2 * upper][i] * right.b[upper][i];
        sum[2] += rows.a[2 * upper + 1][i] * left.b[upper][i];
        sum[3] += rows.a[2 * upper + 1][i] * right.b[upper][i];
      }
    }
  }
}

#else

// 16 bytes from global to shared memory, or 16 zero bytes.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int kKeep>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kKeep) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
template <bool kTranspose>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
}

template <typename T>
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#endif

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  Vector<T, 2> pair{from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

template <int kTiles>
__device__ __forceinline__ void clear(float (&sum)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
}

// sum += A B^T: A is the warp's 16 rows, B has 8 rows a tile, both kDepth long and kStride apart.
template <int kDepth, int kStride, int kTiles, typename T>
__device__ __forceinline__ void multiply_transposed(float (&sum)[kTiles][4], const T* a,
                                                    const T* b) {
  int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(kTiles % 2 == 0 && kDepth % 16 == 0);
    const T* a_row = a + lane % 16 * kStride + lane / 16 * 8;
    const T* b_row = b + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a_part[4];
      load_matrices<false>(a_part, a_row + k);
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        uint32_t b_part[4];
        load_matrices<false>(b_part, b_row + 8 * i * kStride + k);
        mma<T>(sum[i], a_part, {b_part[0], b_part[1]});
        mma<T>(sum[i + 1], a_part, {b_part[2], b_part[3]});
      }
    }
  } else {
    const T* a_row = a + lane / 4 * kStride;
    const T* b_row = b + lane % 4 * 2 * kStride;
#pragma unroll 1
    for (int k = 0; k < kDepth; k += 4) {
      auto a_low = load_vector<4>(a_row + k), a_high = load_vector<4>(a_row + 8 * kStride + k);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          auto b_part = load_vector<4>(b_row + (8 * i + j) * kStride + k);
          // Four products first, then their sum onto the rest: half the rounding error.
          float low = a_low.data[0] * b_part.data[0], high = a_high.data[0] * b_part.data[0];
#pragma unroll
          for (int n = 1; n < 4; ++n) {
            low = fmaf(a_low.data[n], b_part.data[n], low);
            high = fmaf(a_high.data[n], b_part.data[n], high);
          }
          sum[i][j] += low;
          sum[i][2 + j] += high;
        }
      }
    }
  }
}

// sum += P B: P is an accumulator of 8 kDepthTiles columns, B has as many rows, kStride apart.
template <int kStride, int kDepthTiles, int kTiles, typename T>
__device__ __forceinline__ void multiply(float (&sum)[kTiles][4], const float (&p)[kDepthTiles][4],
                                         const T* b) {
  int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 2) {
    static_assert(kTiles % 2 == 0 && kDepthTiles % 2 == 0);
    const T* b_row = b + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kDepthTiles; k += 2) {
      // An accumulator's layout is that of the left operand, two tiles side by side.
      uint32_t a_part[4] = {pack<T>(p[k][0], p[k][1]), pack<T>(p[k][2], p[k][3]),
                            pack<T>(p[k + 1][0], p[k + 1][1]), pack<T>(p[k + 1][2], p[k + 1][3])};
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        uint32_t b_part[4];
        load_matrices<true>(b_part, b_row + 8 * k * kStride + 8 * i);
        mma<T>(sum[i], a_part, {b_part[0], b_part[1]});
        mma<T>(sum[i + 1], a_part, {b_part[2], b_part[3]});
      }
    }
  } else {
    const T* b_row = b + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < kDepthTiles; ++k) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        float low = __shfl_sync(kFullWarp, p[k][n % 2], lane / 4 * 4 + n / 2);
        float high = __shfl_sync(kFullWarp, p[k][2 + n % 2], lane / 4 * 4 + n / 2);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          auto b_part = load_vector<2>(b_row + (8 * k + n) * kStride + 8 * i);
          sum[i][0] = fmaf(low, b_part.data[0], sum[i][0]);
          sum[i][1] = fmaf(low, b_part.data[1], sum[i][1]);
          sum[i][2] = fmaf(high, b_part.data[0], sum[i][2]);
          sum[i][3] = fmaf(high, b_part.data[1], sum[i][3]);
        }
      }
    }
  }
}

// The quad of lanes that holds a row: sum, and largest.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, 1));
  return fmaxf(value, __shfl_xor_sync(kFullWarp, value, 2));
}

}  // namespace tiue
