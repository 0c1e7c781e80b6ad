#include "../ops.h"
#include "attention.h"

namespace tiue {
namespace attention {
namespace {

template <typename T, int kDim>
struct ForwardTraits {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQueries = 16 * kWarps;
  // 80 keys hold the 77 of a prompt in one tile.
  static constexpr int kKeys = sizeof(T) == 2 ? (kDim <= 160 ? 80 : 48) : (kDim <= 64 ? 80 : 16);
  static constexpr int kStride = kDim + Tile<T>::kPad;
  static constexpr size_t kSharedBytes =
      (kQueries + 2 * kKeys) * kStride * sizeof(T) + kKeys * sizeof(float);
};

template <typename T>
struct ForwardParams {
  Geometry geometry;
  Rows<const T> query, key, value;
  Rows<T> out;
  const float* bias;  // [B, keys] or null
  float* logsumexp;   // [K*B, heads, N]
  int tiles, tiles_per_block;
};

// One block: some tiles of 64 queries of one head and key row, 16 queries a warp. Keys and values
// come in tiles; when all fit in one tile they are loaded once and serve all the block's queries,
// else each query tile walks over them with the next tile's copy under way. Scores, softmax
// (running maximum and sum) and output are float32; probabilities are rounded to T for the
// second product.
template <typename T, int kDim>
__global__ void __launch_bounds__(ForwardTraits<T, kDim>::kThreads, 1)
    forward_kernel(ForwardParams<T> params) {
  using Traits = ForwardTraits<T, kDim>;
  constexpr int kKeys = Traits::kKeys, kStride = Traits::kStride, kTiles = kKeys / 8;
  const Geometry& g = params.geometry;
  T* query_tile = reinterpret_cast<T*>(shared_memory());
  T* key_tile = query_tile + Traits::kQueries * kStride;
  T* value_tile = key_tile + kKeys * kStride;
  float* bias_tile = reinterpret_cast<float*>(value_tile + kKeys * kStride);

  int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int blocks_per_head = ceil_div(params.tiles, params.tiles_per_block);
  int head = static_cast<int>(blockIdx.x) / blocks_per_head % g.heads;
  int b = static_cast<int>(blockIdx.x) / blocks_per_head / g.heads;
  int first_tile = static_cast<int>(blockIdx.x) % blocks_per_head * params.tiles_per_block;
  int last_tile = min(first_tile + params.tiles_per_block, params.tiles);
  int key_tiles = ceil_div(g.keys, kKeys);
  int total = g.timesteps * g.queries;
  float scale = g.scale * Base<T>::kLog;

  auto load_keys = [&](int tile) {
    load_tile<kDim>(key_tile, kKeys, g.head_dim, params.key.data, [&](int i) {
      int key = tile * kKeys + i;
      return key < g.keys ? params.key.at(b, key, head, g) : nullptr;
    });
    if (thread < kKeys) {  // keys beyond the last count as masked
      int key = tile * kKeys + thread;
      float bias = params.bias && key < g.keys
                       ? params.bias[static_cast<int64_t>(b) * g.keys + key] * Base<T>::kLog
                       : 0.0f;
      bias_tile[thread] = key < g.keys ? bias : -INFINITY;
    }
  };
  auto load_values = [&](int tile) {
    load_tile<kDim>(value_tile, kKeys, g.head_dim, params.value.data, [&](int i) {
      int key = tile * kKeys + i;
      return key < g.keys ? params.value.at(b, key, head, g) : nullptr;
    });
  };

  for (int tile = first_tile; tile < last_tile; ++tile) {
    int first_query = tile * Traits::kQueries;
    bool fresh = key_tiles > 1 || tile == first_tile;
    __syncthreads();  // the previous queries' keys, values and bias have been read
    load_tile<kDim>(query_tile, Traits::kQueries, g.head_dim, params.query.data, [&](int i) {
      int query = first_query + i;
      return query < total ? params.query.at_query(query, b, head, g) : nullptr;
    });
    if (fresh) load_keys(0);
    commit_copies();

    float out[kDim / 8][4];
    clear(out);
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};
    for (int j = 0; j < key_tiles; ++j) {
      wait_for_copies<0>();
      __syncthreads();  // keys are there, and the previous values have been read
      if (fresh) load_values(j);
      commit_copies();

      float scores[kTiles][4];
      clear(scores);
      multiply_transposed<kDim, kStride>(scores, query_tile + 16 * warp * kStride, key_tile);
      float largest[2] = {row_max[0], row_max[1]};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          scores[i][n] = fmaf(scores[i][n], scale, bias_tile[8 * i + lane % 4 * 2 + n % 2]);
          largest[n / 2] = fmaxf(largest[n / 2], scores[i][n]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[half] = quad_max(largest[half]);
        // Nothing but masked keys so far: subtract 0, not -inf.
        float shift = largest[half] == -INFINITY ? 0.0f : largest[half];
        float shrink = Base<T>::power(row_max[half] - shift);
        row_max[half] = largest[half];
        row_sum[half] *= shrink;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          scores[i][2 * half] = Base<T>::power(scores[i][2 * half] - shift);
          scores[i][2 * half + 1] = Base<T>::power(scores[i][2 * half + 1] - shift);
          row_sum[half] += scores[i][2 * half] + scores[i][2 * half + 1];
        }
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) {
          out[i][2 * half] *= shrink;
          out[i][2 * half + 1] *= shrink;
        }
      }
      wait_for_copies<0>();
      __syncthreads();  // values are there, and the keys and their bias have been read
      if (j + 1 < key_tiles) load_keys(j + 1);
      commit_copies();
      multiply<kStride>(out, scores, value_tile);
    }

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_sum[half] = quad_sum(row_sum[half]);
      if (row_max[half] == -INFINITY) {  // every key is masked: an output and a logsumexp of 0
        row_max[half] = 0.0f;
        row_sum[half] = 1.0f;
      }
      inverse[half] = 1.0f / row_sum[half];
      int query = first_query + 16 * warp + lane / 4 + 8 * half;
      if (lane % 4 == 0 && query < total) {
        params.logsumexp[statistic_index(query, b, head, g)] =
            (row_max[half] + Base<T>::log(row_sum[half])) * Base<T>::kLn;
      }
    }
    store_rows<kDim>(query_tile + 16 * warp * kStride, out, inverse[0], inverse[1], 0, g.head_dim,
                     [&](int i) {
                       int query = first_query + 16 * warp + i;
                       return query < total ? params.out.at_query(query, b, head, g) : nullptr;
                     });
  }
  wait_for_copies<0>();
}

}  // namespace
}  // namespace attention

Tensors2 cross_timestep_attention_fwd(Tensor query, Tensor key, Tensor value, int64_t num_heads,
                                      double scale, std::optional<Tensor> attention_bias) {
  using namespace attention;
  Device device(query);
  Geometry g = make_geometry(query, key, num_heads, scale);
  query = readable(query);
  key = readable(key);
  value = readable(value);
  std::optional<Tensor> bias = float_bias(attention_bias);
  Tensor out = torch::stable::new_empty(query, query.sizes());
  Tensor logsumexp = new_float(query, {query.size(0), num_heads, query.size(1)});
  if (!out.numel()) return {out, logsumexp};
  dispatch_head(query, g.head_dim, [&](auto zero, auto dim) {
    using T = decltype(zero);
    using Traits = ForwardTraits<T, decltype(dim)::value>;
    ForwardParams<T> params{g,
                            rows_of<const T>(query),
                            rows_of<const T>(key),
                            rows_of<const T>(value),
                            rows_of<T>(out),
                            bias ? data<float>(*bias) : nullptr,
                            data<float>(logsumexp),
                            ceil_div(g.timesteps * g.queries, Traits::kQueries),
                            1};
    int64_t heads = static_cast<int64_t>(g.batch) * g.heads;
    // Keys that fit in one tile are loaded once a block: few blocks then, but enough for all
    // multiprocessors to hold 8.
    int64_t most = heads * params.tiles / (8 * device.multiprocessors());
    if (g.keys <= Traits::kKeys)
      params.tiles_per_block = static_cast<int>(std::max<int64_t>(1, most));
    device.launch(forward_kernel<T, decltype(dim)::value>,
                  heads * ceil_div(params.tiles, params.tiles_per_block), Traits::kThreads,
                  Traits::kSharedBytes, params);
  });
  return {out, logsumexp};
}

}  // namespace tiue
