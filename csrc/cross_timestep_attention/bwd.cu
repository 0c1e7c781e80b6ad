#include "../ops.h"
#include "attention.h"

namespace tiue {
namespace attention {
namespace {

template <typename T>
struct BackwardParams {
  Geometry geometry;
  Rows<const T> grad_out, query, key, value, out;
  Rows<T> grad_query, grad_key, grad_value;
  const float* bias;       // [B, keys] or null
  const float* logsumexp;  // [K*B, heads, N]
  float* delta;            // [K*B, heads, N]: grad_out . out
  // Where the queries of a key tile are split over blocks, their sums before they are added up:
  // [splits, B, keys, heads * head_dim], and for the bias [splits, heads, B, keys].
  float* partial_key;
  float* partial_value;
  float* partial_bias;
  int tiles, splits;
};

// The gradient of a score is p (dp - delta), with dp = grad_out . value and delta the mean of dp
// under p, which is grad_out . out. Eight lanes a token and head.
template <typename T>
__global__ void __launch_bounds__(256) delta_kernel(BackwardParams<T> params) {
  constexpr int kChunk = Tile<T>::kChunk;
  const Geometry& g = params.geometry;
  int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 8;
  int64_t total = static_cast<int64_t>(g.timesteps) * g.batch * g.queries * g.heads;
  int head = static_cast<int>(index % g.heads);
  int token = static_cast<int>(index / g.heads % g.queries);
  int row = static_cast<int>(index / g.heads / g.queries);
  float sum = 0.0f;
  if (index < total) {
    const T* grad = params.grad_out.at(row, token, head, g);
    const T* out = params.out.at(row, token, head, g);
    for (int i = static_cast<int>(threadIdx.x) % 8 * kChunk; i < g.head_dim; i += 8 * kChunk) {
      auto left = load_vector<kChunk>(grad + i), right = load_vector<kChunk>(out + i);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) sum += to_float(left.data[j]) * to_float(right.data[j]);
    }
  }
  sum = quad_sum(sum);
  sum += __shfl_xor_sync(kFullWarp, sum, 4);
  if (index < total && threadIdx.x % 8 == 0) {
    params.delta[(static_cast<int64_t>(row) * g.heads + head) * g.queries + token] = sum;
  }
}

template <typename T, int kDim>
struct QueryTraits {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kWarps = kHalf || kDim <= 64 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQueries = 16 * kWarps;
  static constexpr int kKeys = kHalf ? (kDim <= 80    ? 80
                                        : kDim <= 160 ? 48
                                                      : 32)
                                     : (kDim <= 64 ? 48 : 16);
  static constexpr int kStride = kDim + Tile<T>::kPad;
  static constexpr size_t kSharedBytes =
      2 * (kQueries + kKeys) * kStride * sizeof(T) + kKeys * sizeof(float);
};

// One block: the gradient of a tile of queries, 16 a warp, walking over the tiles of keys and
// values; dQ = scale (P * (dO V^T - delta)) K with P recomputed from the logsumexp. Where all keys
// fit in one tile, delta is summed here as P . dO V^T, free of the rounding of the output.
template <typename T, int kDim>
__global__ void __launch_bounds__(QueryTraits<T, kDim>::kThreads, 1)
    query_kernel(BackwardParams<T> params) {
  using Traits = QueryTraits<T, kDim>;
  constexpr int kKeys = Traits::kKeys, kStride = Traits::kStride, kTiles = kKeys / 8;
  const Geometry& g = params.geometry;
  T* query_tile = reinterpret_cast<T*>(shared_memory());
  T* grad_tile = query_tile + Traits::kQueries * kStride;
  T* key_tile = grad_tile + Traits::kQueries * kStride;
  T* value_tile = key_tile + kKeys * kStride;
  float* bias_tile = reinterpret_cast<float*>(value_tile + kKeys * kStride);

  int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int head = static_cast<int>(blockIdx.x) / params.tiles % g.heads;
  int b = static_cast<int>(blockIdx.x) / params.tiles / g.heads;
  int first_query = static_cast<int>(blockIdx.x) % params.tiles * Traits::kQueries;
  int key_tiles = ceil_div(g.keys, kKeys);
  int total = g.timesteps * g.queries;
  float scale = g.scale * Base<T>::kLog;

  auto load_keys = [&](int tile) {
    load_tile<kDim>(key_tile, kKeys, g.head_dim, params.key.data, [&](int i) {
      int key = tile * kKeys + i;
      return key < g.keys ? params.key.at(b, key, head, g) : nullptr;
    });
  };
  auto load_values = [&](int tile) {
    load_tile<kDim>(value_tile, kKeys, g.head_dim, params.value.data, [&](int i) {
      int key = tile * kKeys + i;
      return key < g.keys ? params.value.at(b, key, head, g) : nullptr;
    });
    if (thread < kKeys) {
      int key = tile * kKeys + thread;
      float bias = params.bias && key < g.keys
                       ? params.bias[static_cast<int64_t>(b) * g.keys + key] * Base<T>::kLog
                       : 0.0f;
      bias_tile[thread] = key < g.keys ? bias : -INFINITY;
    }
  };
  auto query_row = [&](const Rows<const T>& rows, int i) {
    int query = first_query + i;
    return query < total ? rows.at_query(query, b, head, g) : nullptr;
  };

  load_tile<kDim>(query_tile, Traits::kQueries, g.head_dim, params.query.data,
                  [&](int i) { return query_row(params.query, i); });
  load_tile<kDim>(grad_tile, Traits::kQueries, g.head_dim, params.query.data,
                  [&](int i) { return query_row(params.grad_out, i); });
  load_keys(0);
  load_values(0);
  commit_copies();

  float logsumexp[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int query = first_query + 16 * warp + lane / 4 + 8 * half;
    int64_t at = query < total ? statistic_index(query, b, head, g) : 0;
    logsumexp[half] = params.logsumexp[at] * Base<T>::kLog;
    delta[half] = key_tiles > 1 ? params.delta[at] : 0.0f;
  }

  float grad_query[kDim / 8][4];
  clear(grad_query);
  for (int j = 0; j < key_tiles; ++j) {
    wait_for_copies<0>();
    __syncthreads();
    float p[kTiles][4], grad[kTiles][4], sum[2] = {0.0f, 0.0f};
    clear(p);
    clear(grad);
    multiply_transposed<kDim, kStride>(p, query_tile + 16 * warp * kStride, key_tile);
    multiply_transposed<kDim, kStride>(grad, grad_tile + 16 * warp * kStride, value_tile);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float bias = bias_tile[8 * i + lane % 4 * 2 + n % 2] - logsumexp[n / 2];
        p[i][n] = Base<T>::power(fmaf(p[i][n], scale, bias));
        sum[n / 2] += p[i][n] * grad[i][n];
      }
    }
    if (key_tiles == 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        delta[half] = quad_sum(sum[half]);
        int query = first_query + 16 * warp + lane / 4 + 8 * half;
        if (lane % 4 == 0 && query < total) {
          params.delta[statistic_index(query, b, head, g)] = delta[half];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int n = 0; n < 4; ++n) grad[i][n] = p[i][n] * (grad[i][n] - delta[n / 2]);
    }
    __syncthreads();  // values and bias have been read
    if (j + 1 < key_tiles) load_values(j + 1);
    multiply<kStride>(grad_query, grad, key_tile);
    __syncthreads();  // keys have been read
    if (j + 1 < key_tiles) load_keys(j + 1);
    commit_copies();
  }
  store_rows<kDim>(query_tile + 16 * warp * kStride, grad_query, g.scale, g.scale, 0, g.head_dim,
                   [&](int i) {
                     int query = first_query + 16 * warp + i;
                     return query < total ? params.grad_query.at_query(query, b, head, g) : nullptr;
                   });
}

template <typename T, int kDim>
struct KeyTraits {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kKeyWarps = kHalf ? 4 : 2;
  // Two gradients of 16 keys in registers: wide heads are cut in two, the scores computed twice.
  static constexpr int kColumnWarps = kDim <= 80 ? 1 : 2;
  static constexpr int kThreads = 32 * kKeyWarps * kColumnWarps;
  static constexpr int kKeys = 16 * kKeyWarps;
  static constexpr int kQueries = kHalf ? 32 : 16;
  static constexpr int kStride = kDim + Tile<T>::kPad;
  static constexpr int kStages = 2;
  static constexpr size_t kSharedBytes = 2 * (kKeys + kStages * kQueries) * kStride * sizeof(T) +
                                         2 * kStages * kQueries * sizeof(float);
};

// One block: the gradients of a tile of keys and values, 16 a warp, walking over the queries of
// all timesteps, or over this block's share of them: dV = P^T dO and
// dK = scale (P * (dO V^T - delta))^T Q, everything transposed so that sums run over queries. The
// next queries' copy is under way while the present ones are used.
template <typename T, int kDim>
__global__ void __launch_bounds__(KeyTraits<T, kDim>::kThreads, 1)
    key_kernel(BackwardParams<T> params) {
  using Traits = KeyTraits<T, kDim>;
  constexpr int kKeys = Traits::kKeys, kQueries = Traits::kQueries, kStride = Traits::kStride;
  constexpr int kTiles = kQueries / 8, kColumns = kDim / Traits::kColumnWarps;
  const Geometry& g = params.geometry;
  T* key_tile = reinterpret_cast<T*>(shared_memory());
  T* value_tile = key_tile + kKeys * kStride;
  T* query_tiles = value_tile + kKeys * kStride;
  T* grad_tiles = query_tiles + Traits::kStages * kQueries * kStride;
  float* logsumexps = reinterpret_cast<float*>(grad_tiles + Traits::kStages * kQueries * kStride);
  float* deltas = logsumexps + Traits::kStages * kQueries;

  int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  int warp = thread / 32 % Traits::kKeyWarps;
  int column = thread / 32 / Traits::kKeyWarps * kColumns;
  int key_tiles = ceil_div(g.keys, kKeys);
  int block = static_cast<int>(blockIdx.x);
  int split = block % params.splits;
  block /= params.splits;
  int first_key = block % key_tiles * kKeys;
  int head = block / key_tiles % g.heads;
  int b = block / key_tiles / g.heads;
  int total = g.timesteps * g.queries;
  int tiles_per_split = ceil_div(params.tiles, params.splits);
  int first_tile = split * tiles_per_split;
  int last_tile = min(first_tile + tiles_per_split, params.tiles);
  float scale = g.scale * Base<T>::kLog;

  auto load_queries = [&](int tile, int stage) {
    auto row = [&](const Rows<const T>& rows, int i) {
      int query = tile * kQueries + i;
      return query < total ? rows.at_query(query, b, head, g) : nullptr;
    };
    load_tile<kDim>(query_tiles + stage * kQueries * kStride, kQueries, g.head_dim,
                    params.query.data, [&](int i) { return row(params.query, i); });
    load_tile<kDim>(grad_tiles + stage * kQueries * kStride, kQueries, g.head_dim,
                    params.query.data, [&](int i) { return row(params.grad_out, i); });
    if (thread < kQueries) {  // a query beyond the last has probability 0
      int query = tile * kQueries + thread;
      int64_t at = query < total ? statistic_index(query, b, head, g) : 0;
      logsumexps[stage * kQueries + thread] =
          query < total ? params.logsumexp[at] * Base<T>::kLog : INFINITY;
      deltas[stage * kQueries + thread] = query < total ? params.delta[at] : 0.0f;
    }
  };
  auto key_row = [&](const Rows<const T>& rows, int i) {
    return first_key + i < g.keys ? rows.at(b, first_key + i, head, g) : nullptr;
  };

  load_tile<kDim>(key_tile, kKeys, g.head_dim, params.key.data,
                  [&](int i) { return key_row(params.key, i); });
  load_tile<kDim>(value_tile, kKeys, g.head_dim, params.key.data,
                  [&](int i) { return key_row(params.value, i); });
  if (first_tile < last_tile) load_queries(first_tile, 0);
  commit_copies();

  float bias[2], bias_sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int key = first_key + 16 * warp + lane / 4 + 8 * half;
    bias[half] = params.bias && key < g.keys
                     ? params.bias[static_cast<int64_t>(b) * g.keys + key] * Base<T>::kLog
                     : 0.0f;
  }
  float grad_key[kColumns / 8][4], grad_value[kColumns / 8][4];
  clear(grad_key);
  clear(grad_value);
  for (int tile = first_tile; tile < last_tile; ++tile) {
    int stage = (tile - first_tile) % Traits::kStages;
    const T* query_tile = query_tiles + stage * kQueries * kStride;
    const T* grad_tile = grad_tiles + stage * kQueries * kStride;
    wait_for_copies<0>();
    __syncthreads();  // these queries are there, and the previous ones have been read
    if (tile + 1 < last_tile) load_queries(tile + 1, 1 - stage);
    commit_copies();

    float p[kTiles][4], grad[kTiles][4];
    clear(p);
    clear(grad);
    multiply_transposed<kDim, kStride>(p, key_tile + 16 * warp * kStride, query_tile);
    multiply_transposed<kDim, kStride>(grad, value_tile + 16 * warp * kStride, grad_tile);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        int at = stage * kQueries + 8 * i + lane % 4 * 2 + n % 2;
        p[i][n] = Base<T>::power(fmaf(p[i][n], scale, bias[n / 2] - logsumexps[at]));
        grad[i][n] = p[i][n] * (grad[i][n] - deltas[at]);
        bias_sum[n / 2] += grad[i][n];
      }
    }
    multiply<kStride>(grad_value, p, grad_tile + column);
    multiply<kStride>(grad_key, grad, query_tile + column);
  }
  wait_for_copies<0>();
  __syncthreads();  // keys and values have been read: their tiles stage the results

  if (params.partial_bias && column == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = quad_sum(bias_sum[half]);
      int key = first_key + 16 * warp + lane / 4 + 8 * half;
      if (lane % 4 == 0 && key < g.keys) {
        int64_t row = (static_cast<int64_t>(split) * g.heads + head) * g.batch + b;
        params.partial_bias[row * g.keys + key] = sum;
      }
    }
  }
  if (params.splits == 1) {
    auto target = [&](const Rows<T>& rows, int i) {
      int key = first_key + 16 * warp + i;
      return key < g.keys ? rows.at(b, key, head, g) : nullptr;
    };
    store_rows<kDim>(key_tile + 16 * warp * kStride, grad_key, g.scale, g.scale, column, g.head_dim,
                     [&](int i) { return target(params.grad_key, i); });
    store_rows<kDim>(value_tile + 16 * warp * kStride, grad_value, 1.0f, 1.0f, column, g.head_dim,
                     [&](int i) { return target(params.grad_value, i); });
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int key = first_key + 16 * warp + lane / 4 + 8 * half;
    if (key >= g.keys) continue;
    int64_t row = (static_cast<int64_t>(split) * g.batch + b) * g.keys + key;
    int64_t begin = (row * g.heads + head) * g.head_dim;
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      int at = column + 8 * i + lane % 4 * 2;
      if (at >= g.head_dim) continue;
      store_vector(
          params.partial_key + begin + at,
          Vector<float, 2>{grad_key[i][2 * half] * g.scale, grad_key[i][2 * half + 1] * g.scale});
      store_vector(params.partial_value + begin + at,
                   Vector<float, 2>{grad_value[i][2 * half], grad_value[i][2 * half + 1]});
    }
  }
}

}  // namespace
}  // namespace attention

Tensors4 cross_timestep_attention_bwd(Tensor grad_out, Tensor query, Tensor key, Tensor value,
                                      int64_t num_heads, double scale,
                                      std::optional<Tensor> attention_bias, Tensor out,
                                      Tensor logsumexp, bool needs_bias_grad) {
  using namespace attention;
  Device device(query);
  Geometry g = make_geometry(query, key, num_heads, scale);
  grad_out = readable(grad_out);
  query = readable(query);
  key = readable(key);
  value = readable(value);
  out = readable(out);
  logsumexp = torch::stable::contiguous(logsumexp);
  std::optional<Tensor> bias = float_bias(attention_bias);
  Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  Tensor grad_key = torch::stable::new_empty(key, key.sizes());
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  needs_bias_grad = needs_bias_grad && attention_bias;
  Tensor grad_bias = needs_bias_grad
                         ? torch::stable::new_empty(*attention_bias, attention_bias->sizes())
                         : torch::stable::new_empty(query, {0});
  Tensor delta = torch::stable::new_empty(query, logsumexp.sizes(), ScalarType::Float);
  if (!key.numel()) return {grad_query, grad_key, grad_value, grad_bias};

  dispatch_head(query, g.head_dim, [&](auto zero, auto dim) {
    using T = decltype(zero);
    constexpr int kDim = decltype(dim)::value;
    int total = g.timesteps * g.queries;
    BackwardParams<T> params{};
    params.geometry = g;
    params.grad_out = rows_of<const T>(grad_out);
    params.query = rows_of<const T>(query);
    params.key = rows_of<const T>(key);
    params.value = rows_of<const T>(value);
    params.out = rows_of<const T>(out);
    params.grad_query = rows_of<T>(grad_query);
    params.grad_key = rows_of<T>(grad_key);
    params.grad_value = rows_of<T>(grad_value);
    params.bias = bias ? data<float>(*bias) : nullptr;
    params.logsumexp = data<float>(logsumexp);
    params.delta = data<float>(delta);

    using Query = QueryTraits<T, kDim>;
    if (g.keys > Query::kKeys) {
      device.launch(delta_kernel<T>, (delta.numel() * 8 + 255) / 256, 256, 0, params);
    }
    int64_t heads = static_cast<int64_t>(g.batch) * g.heads;
    params.tiles = ceil_div(total, Query::kQueries);
    device.launch(query_kernel<T, kDim>, heads * params.tiles, Query::kThreads, Query::kSharedBytes,
                  params);

    // Few keys make few blocks: their queries are split until there are two blocks for every
    // multiprocessor, but no further than 8 tiles of queries a block.
    using Key = KeyTraits<T, kDim>;
    int64_t blocks = heads * ceil_div(g.keys, Key::kKeys);
    params.tiles = ceil_div(total, Key::kQueries);
    int64_t most = std::max(1, ceil_div(params.tiles, 8)), wanted = 2 * device.multiprocessors();
    params.splits = static_cast<int>(std::clamp<int64_t>((wanted + blocks - 1) / blocks, 1, most));
    int64_t splits = params.splits;
    Tensor partial = new_float(query, {2, splits > 1 ? splits * key.numel() : 0});
    Tensor partial_bias =
        new_float(query, {needs_bias_grad ? splits * g.heads * bias->numel() : 0});
    params.partial_key = data<float>(partial);
    params.partial_value = params.partial_key + partial.numel() / 2;
    params.partial_bias = needs_bias_grad ? data<float>(partial_bias) : nullptr;
    device.launch(key_kernel<T, kDim>, blocks * splits, Key::kThreads, Key::kSharedBytes, params);
    if (splits > 1) {
      sum_rows(device, params.partial_key, grad_key, params.splits, grad_key.numel(), 0);
      sum_rows(device, params.partial_value, grad_value, params.splits, grad_value.numel(), 0);
    }
    if (needs_bias_grad) {
      sum_rows(device, params.partial_bias, grad_bias, params.splits * g.heads, grad_bias.numel(),
               0);
    }
  });
  return {grad_query, grad_key, grad_value, grad_bias};
}

}  // namespace tiue
