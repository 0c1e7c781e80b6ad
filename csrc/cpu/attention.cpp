// Attention of K*B rows of queries over B (or K*B) rows of keys and values, without the matrix of
// scores: 128 keys at a time, the running maximum and sum of every query beside (Milakov and
// Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "product.h"

namespace tiue {
namespace {

using torch::stable::Tensor;

// Keys and values of a block (head size 40: 20 KB each) stay in the L1 cache while all queries of a
// task meet them; scores of a task take 48 KB.
constexpr int64_t kKeys = 128, kQueries = 96;
constexpr float kLn2 = 0.693147181f;

// One head: where its packed keys and values are, and how large.
struct Head {
  int64_t size, keys;
  int64_t padded_keys() const { return panels_of(keys) * kPanel; }
  int64_t padded_size() const { return (size + 7) / 8 * 8; }
  int64_t floats() const { return padded_keys() * (size + padded_size()); }
};

#if TIUE_PRODUCTS

using Integers = int32_t __attribute__((vector_size(32)));

// NaN where b is NaN.
TIUE_AVX2 TIUE_INLINE Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }

// 2^x of four vectors, whose chains of instructions overlap: 2^n 2^r with r in [-0.5, 0.5], where
// the polynomial of least relative error of degree 6 is off by 2e-9. Least result: 2^-126.
TIUE_AVX2 TIUE_INLINE void powers_of_two(Vector x[4]) {
  constexpr float kSeries[] = {1.33999309e-3f, 9.61848907e-3f, 5.55032864e-2f,
                               0.240226462f,   0.693147182f,   1.0f};
  constexpr float kRound = 12582912.0f + 127;  // 1.5 * 2^23: the last bits of a sum are n + 127
  Vector shifted[4], r[4], sum[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = larger(Vector{} - 126.0f, x[i]);
    shifted[i] = x[i] + kRound;
    r[i] = x[i] - (shifted[i] - kRound);
    sum[i] = Vector{} + 1.53458124e-4f;
  }
#pragma GCC unroll 6
  for (float factor : kSeries) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] = sum[i] * r[i] + factor;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Integers exponent = (Integers)shifted[i] << 23;
    x[i] = sum[i] * (Vector)exponent;
  }
}

// The scores of one query over ln(2), the last ones -inf up to a multiple of 32, to their weights;
// returns what scales the sums so far.
TIUE_AVX2 float weigh(float* scores, int64_t padded, float* maximum, float* sum) {
  Vector most[4], total[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    most[i] = load(scores + kLanes * i);
    total[i] = Vector{};
  }
  for (int64_t j = 4 * kLanes; j < padded; j += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = larger(most[i], load(scores + j + kLanes * i));
  }
  const Vector top = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  float peak = *maximum;
  for (int lane = 0; lane < kLanes; ++lane) peak = std::max(peak, top[lane]);
  for (int64_t j = 0; j < padded; j += 4 * kLanes) {
    Vector weights[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) weights[i] = load(scores + j + kLanes * i) - peak;
    powers_of_two(weights);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(scores + j + kLanes * i, weights[i]);
      total[i] += weights[i];
    }
  }
  const Vector whole = (total[0] + total[1]) + (total[2] + total[3]);
  const float scale = *maximum == peak ? 1.0f : std::exp2(*maximum - peak);
  *sum *= scale;
  for (int lane = 0; lane < kLanes; ++lane) *sum += whole[lane];
  *maximum = peak;
  return scale;
}

TIUE_AVX2 void scale_row(float* row, int64_t n, float factor) {
  for (int64_t j = 0; j < n; ++j) row[j] *= factor;
}

// The packed keys, then the packed values of one head.
TIUE_AVX2 void pack_head(const float* key, const float* value, int64_t stride_key,
                         int64_t stride_value, const Head& head, float scale, float* packed) {
  for (int64_t j = 0; j < head.keys; j += kPanel) {
    pack_transposed(key + j * stride_key, stride_key, std::min(kPanel, head.keys - j), head.size,
                    scale, packed + j * head.size);
  }
  float* to = packed + head.padded_keys() * head.size;
  const int64_t width = head.padded_size();
  for (int64_t j = 0; j < head.keys; ++j) {
    std::memcpy(to + j * width, value + j * stride_value, head.size * sizeof(float));
    std::memset(to + j * width + head.size, 0, (width - head.size) * sizeof(float));
  }
}

// sums[queries][width] += weights[queries][keys] * values[keys][width], width a multiple of 8.
TIUE_AVX2 void add_values(const float* weights, int64_t queries, int64_t keys, const float* values,
                          int64_t width, float* sums) {
  int64_t c = 0;
  if (width == 8) {
    tiles<6, 1, Plus::kOutput>(weights, kKeys, queries, values, width, keys, sums, width);
    return;
  }
  if (width % 16) {
    tiles<4, 3, Plus::kOutput>(weights, kKeys, queries, values, width, keys, sums, width);
    c = 24;
  }
  for (; c < width; c += kPanel) {
    tiles<6, 2, Plus::kOutput>(weights, kKeys, queries, values + c, width, keys, sums + c, width);
  }
}

// Up to kQueries queries of one head.
TIUE_AVX2 void attend(const float* query, int64_t stride_query, int64_t queries,
                      const float* packed, const Head& head, float* out, int64_t stride_out,
                      float* logsumexp, std::vector<float>& memory) {
  const int64_t width = head.padded_size();
  memory.resize(kQueries * (kKeys + width + 2));
  float* scores = memory.data();
  float* sums = scores + kQueries * kKeys;
  float* maximum = sums + kQueries * width;
  float* total = maximum + kQueries;
  std::fill(sums, maximum, 0.0f);
  std::fill(maximum, total, -std::numeric_limits<float>::infinity());
  std::fill(total, total + kQueries, 0.0f);
  const float* values = packed + head.padded_keys() * head.size;
  for (int64_t first = 0; first < head.keys; first += kKeys) {
    const int64_t keys = std::min(kKeys, head.keys - first);
    for (int64_t j = 0; j < keys; j += kPanel) {
      tiles<6, 2, Plus::kNothing>(query, stride_query, queries, packed + (first + j) * head.size,
                                  kPanel, head.size, scores + j, kKeys);
    }
    const int64_t padded = (keys + 31) / 32 * 32;
    for (int64_t i = 0; i < queries; ++i) {
      float* own = scores + i * kKeys;
      std::fill(own + keys, own + padded, -std::numeric_limits<float>::infinity());
      const float scale = weigh(own, padded, maximum + i, total + i);
      if (scale != 1.0f) scale_row(sums + i * width, width, scale);
    }
    add_values(scores, queries, keys, values + first * width, width, sums);
  }
  for (int64_t i = 0; i < queries; ++i) {
    scale_row(sums + i * width, head.size, 1.0f / total[i]);
    std::memcpy(out + i * stride_out, sums + i * width, head.size * sizeof(float));
    logsumexp[i] = kLn2 * (maximum[i] + std::log2(total[i]));
  }
}

#else

void pack_head(const float*, const float*, int64_t, int64_t, const Head&, float, float*) {}
void attend(const float*, int64_t, int64_t, const float*, const Head&, float*, int64_t, float*,
            std::vector<float>&) {}

#endif

}  // namespace

// query [K*B, N, H*D], key and value [B or K*B, M, H*D], rows in any place -> out [K*B, N, H*D] and
// the logarithm of every query's sum of exponentials [K*B, H, N].
std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, int64_t heads,
                                     double scale) {
  const int64_t rows = query.size(0), queries = query.size(1), channels = query.size(2);
  const int64_t shared = key.size(0);
  const Head head{channels / heads, key.size(1)};
  Tensor out = torch::stable::new_empty(query, {rows, queries, channels});
  Tensor logsumexp = torch::stable::new_empty(query, {rows, heads, queries});
  Tensor packed = torch::stable::new_empty(query, {shared * heads, head.floats()});
  const float* q = static_cast<const float*>(query.data_ptr());
  const float* k = static_cast<const float*>(key.data_ptr());
  const float* v = static_cast<const float*>(value.data_ptr());
  float* to = static_cast<float*>(out.data_ptr());
  float* lse = static_cast<float*>(logsumexp.data_ptr());
  float* memory = static_cast<float*>(packed.data_ptr());
  torch::stable::parallel_for(0, shared * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / heads, column = task % heads * head.size;
      pack_head(k + row * key.stride(0) + column, v + row * value.stride(0) + column, key.stride(1),
                value.stride(1), head, static_cast<float>(scale / kLn2),
                memory + task * head.floats());
    }
  });
  const int64_t blocks = (queries + kQueries - 1) / kQueries;
  torch::stable::parallel_for(0, rows * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> own;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / (heads * blocks), h = task / blocks % heads;
      const int64_t first = task % blocks * kQueries;
      attend(q + row * query.stride(0) + first * query.stride(1) + h * head.size, query.stride(1),
             std::min(kQueries, queries - first),
             memory + (row % shared * heads + h) * head.floats(), head,
             to + (row * queries + first) * channels + h * head.size, channels,
             lse + (row * heads + h) * queries + first, own);
    }
  });
  return {out, logsumexp};
}

}  // namespace tiue

STABLE_TORCH_LIBRARY_IMPL(tiue_cpu, CPU, m) { m.impl("attention", TORCH_BOX(&tiue::attention)); }
