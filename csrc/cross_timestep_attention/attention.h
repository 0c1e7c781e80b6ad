// What the kernels of cross_timestep_attention share: where rows lie, tiles on and off the chip.
//
// The queries of one head and one row of keys are numbered through all timesteps: query
// i = k * N + n is token n of row k * B + b. Every kernel walks tiles of that axis, so that a key
// row is loaded once for all timesteps.
#pragma once

#include <algorithm>

#include "../common/launch.h"
#include "../common/mma.h"

namespace tiue::attention {

// The base of the softmax: 2 for 16-bit types, whose exponential is one instruction; e for float32,
// where the factor log2(e) on every score would cost accuracy.
template <typename T>
struct Base {
  static constexpr bool kTwo = sizeof(T) == 2;
  static constexpr float kLog = kTwo ? 1.4426950408889634f : 1.0f;  // of e
  static constexpr float kLn = kTwo ? 0.6931471805599453f : 1.0f;   // of the base
  static __device__ __forceinline__ float power(float x) {
    if constexpr (kTwo) {
#ifdef __CUDA_ARCH__
      // exp2f is this instruction between three that keep results below 2^-126, which are 0 here.
      float result;
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
      return result;
#else
      return exp2f(x);
#endif
    }
    return expf(x);
  }
  static __device__ __forceinline__ float log(float x) { return kTwo ? log2f(x) : logf(x); }
};

struct Geometry {
  int timesteps, batch;  // batch: rows of keys; timesteps: rows of queries to each
  int queries, keys;     // tokens of one row
  int heads, head_dim;
  float scale;
};

// A [rows, tokens, heads * head_dim] tensor whose heads are side by side.
template <typename T>
struct Rows {
  T* data;
  int64_t row_stride, token_stride;

  __device__ __forceinline__ T* at(int row, int token, int head, const Geometry& g) const {
    return data + row * row_stride + token * token_stride + head * g.head_dim;
  }
  // Query i of key row b, over all timesteps.
  __device__ __forceinline__ T* at_query(int i, int b, int head, const Geometry& g) const {
    return at(i / g.queries * g.batch + b, i % g.queries, head, g);
  }
};

// Index of query i's number in a [K*B, heads, N] array.
__device__ __forceinline__ int64_t statistic_index(int i, int b, int head, const Geometry& g) {
  int64_t row = i / g.queries * g.batch + b;
  return (row * g.heads + head) * g.queries + i % g.queries;
}

// Starts the copies of `count` rows of kDim values, kDim + padding apart; source(i) is row i, or
// null for a row of zeros, as are the columns from head_dim on.
template <int kDim, typename T, typename Source>
__device__ __forceinline__ void load_tile(T* tile, int count, int head_dim, const T* any,
                                          Source source) {
  constexpr int kChunk = Tile<T>::kChunk, kChunks = kDim / kChunk;
  for (int i = static_cast<int>(threadIdx.x); i < count * kChunks;
       i += static_cast<int>(blockDim.x)) {
    int row = i / kChunks, column = i % kChunks * kChunk;
    const T* from = source(row);
    bool valid = from && column < head_dim;
    copy_async(tile + row * (kDim + Tile<T>::kPad) + column, valid ? from + column : any, valid);
  }
}

// Writes a warp's 16 rows of `sum`, each times its factor, through 16 rows of shared memory that
// belong to this warp; target(i) is row i's destination, or null. Columns from `column` on.
template <int kDim, typename T, int kTiles, typename Target>
__device__ __forceinline__ void store_rows(T* tile, const float (&sum)[kTiles][4], float low,
                                           float high, int column, int head_dim, Target target) {
  constexpr int kStride = kDim + Tile<T>::kPad;
  constexpr int kChunk = Tile<T>::kChunk, kChunks = 8 * kTiles / kChunk;
  int lane = static_cast<int>(threadIdx.x) % 32;
  __syncwarp();  // the rows may still be read as an operand
  T* at = tile + lane / 4 * kStride + column + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    store_vector(at + 8 * i,
                 Vector<T, 2>{from_float<T>(sum[i][0] * low), from_float<T>(sum[i][1] * low)});
    store_vector(at + 8 * kStride + 8 * i,
                 Vector<T, 2>{from_float<T>(sum[i][2] * high), from_float<T>(sum[i][3] * high)});
  }
  __syncwarp();
  for (int i = lane; i < 16 * kChunks; i += 32) {
    int row = i / kChunks, from = column + i % kChunks * kChunk;
    T* to = target(row);
    if (to && from < head_dim) {
      store_vector(to + from, load_vector<kChunk>(tile + row * kStride + from));
    }
  }
}

// The tensor as kernels read it: the last axis dense, rows and tokens 16 bytes apart or more.
inline Tensor readable(const Tensor& tensor) {
  int64_t chunk = 16 / tensor.element_size();
  bool dense = tensor.stride(2) == 1 && tensor.stride(1) % chunk == 0 &&
               tensor.stride(0) % chunk == 0 && is_aligned(tensor, 16);
  if (dense) return tensor;
  Tensor copy = torch::stable::contiguous(tensor);
  return is_aligned(copy, 16) ? copy : torch::stable::clone(copy);
}

template <typename T>
Rows<T> rows_of(const Tensor& tensor) {
  return {data<std::remove_const_t<T>>(tensor), tensor.stride(0), tensor.stride(1)};
}

inline Geometry make_geometry(const Tensor& query, const Tensor& key, int64_t num_heads,
                              double scale) {
  Geometry g{};
  g.batch = static_cast<int>(key.size(0));
  g.timesteps = g.batch ? static_cast<int>(query.size(0)) / g.batch : 0;
  g.queries = static_cast<int>(query.size(1));
  g.keys = static_cast<int>(key.size(1));
  g.heads = static_cast<int>(num_heads);
  g.head_dim = static_cast<int>(query.size(2) / num_heads);
  g.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(g.head_dim % 8 == 0 && g.head_dim <= 256, "cross_timestep_attention: head size ",
                  g.head_dim, " is no multiple of 8 up to 256");
  STD_TORCH_CHECK(static_cast<int64_t>(g.timesteps) * g.queries < (int64_t{1} << 31) - 128,
                  "cross_timestep_attention: too many queries");
  return g;
}

// Calls function(T{}, integral_constant<kDim>) with the least padded head size that serves.
// float32 has fewer of them: each costs seconds of compiling and serves debugging, not speed.
template <typename Function>
void dispatch_head(const Tensor& tensor, int head_dim, Function function) {
  dispatch_float(tensor, [&](auto zero) {
    constexpr bool kHalf = sizeof(zero) == 2;
    if constexpr (kHalf) {
      if (head_dim <= 48) return function(zero, std::integral_constant<int, 48>{});
    }
    if (head_dim <= 64) return function(zero, std::integral_constant<int, 64>{});
    if constexpr (kHalf) {
      if (head_dim <= 80) return function(zero, std::integral_constant<int, 80>{});
    }
    if (head_dim <= 160) return function(zero, std::integral_constant<int, 160>{});
    return function(zero, std::integral_constant<int, 256>{});
  });
}

// The bias as float32 [rows of keys, keys], or null.
inline std::optional<Tensor> float_bias(const std::optional<Tensor>& attention_bias) {
  if (!attention_bias) return std::nullopt;
  return torch::stable::contiguous(torch::stable::to(*attention_bias, ScalarType::Float));
}

}  // namespace tiue::attention
