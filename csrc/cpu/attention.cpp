// Attention of K*B rows of queries over B (or K*B) rows of keys and values, without the matrix of
// scores: 128 keys at a time, the running maximum and sum of every query beside (Milakov and
// Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135).
#include <math.h>

#include "product.h"

namespace {

// Keys and values of a block (head size 40: 20 KB each) stay in the L1 cache while all queries of a
// task meet them; scores of a task take 48 KB.
constexpr int64_t kKeys = 128, kQueries = 96;
// Where products are rounded before they are added, long sums are off by more than torch's.
#if defined(__FMA__) || defined(__aarch64__)
constexpr int64_t kScoreDepth = kDepth;
#else
constexpr int64_t kScoreDepth = 16;
#endif
constexpr float kLn2 = 0.693147181f, kMinusInfinity = -__builtin_inff();

// One head: where its packed keys and values are, and how large.
struct Head {
  int64_t size, keys;
  int64_t padded_keys() const { return panels_of(keys) * kPanel; }
  int64_t padded_size() const { return parts_of(size, kLanes) * kLanes; }
  int64_t floats() const { return padded_keys() * (size + padded_size()); }
};

// 2^x of four vectors, whose chains of instructions overlap: 2^n 2^r with r in [-0.5, 0.5], where
// the polynomial of least relative error of degree 6 is off by 2e-9. Least result: 2^-126.
TIUE_INLINE void powers_of_two(Vector x[4]) {
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

// The scores of one query over ln(2), the last ones -inf up to a multiple of four vectors, to their
// weights; returns what scales the sums so far.
inline float weigh(float* scores, int64_t padded, float* maximum, float* sum) {
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
  for (int lane = 0; lane < kLanes; ++lane) peak = peak < top[lane] ? top[lane] : peak;
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
  const float scale = *maximum == peak ? 1.0f : exp2f(*maximum - peak);
  *sum *= scale;
  for (int lane = 0; lane < kLanes; ++lane) *sum += whole[lane];
  *maximum = peak;
  return scale;
}

inline void scale_row(float* row, int64_t n, float factor) {
  for (int64_t j = 0; j < n; ++j) row[j] *= factor;
}

// The packed keys, then the packed values of one head.
inline void pack_head(const float* key, const float* value, int64_t stride_key,
                      int64_t stride_value, const Head& head, float scale, float* packed) {
  for (int64_t j = 0; j < head.keys; j += kPanel) {
    pack_transposed(key + j * stride_key, stride_key, least(kPanel, head.keys - j), head.size,
                    scale, packed + j * head.size);
  }
  float* to = packed + head.padded_keys() * head.size;
  const int64_t width = head.padded_size();
  for (int64_t j = 0; j < head.keys; ++j) {
    std::memcpy(to + j * width, value + j * stride_value, head.size * sizeof(float));
    std::memset(to + j * width + head.size, 0, (width - head.size) * sizeof(float));
  }
}

// out[rows][kLanes * vectors] += a[rows][depth] * b, in tiles of one, two or three vectors.
inline void add_product(const float* a, int64_t stride_a, int64_t rows, const float* b,
                        int64_t stride_b, int64_t depth, float* out, int64_t stride_out,
                        int64_t vectors) {
  constexpr auto kAdd = Plus::kOutput;
  int64_t c = 0;
  if (vectors % 2 && vectors > 1) {
    tiles<3, kAdd>(a, stride_a, rows, b, stride_b, depth, out, stride_out);
    c = 3 * kLanes;
  }
  for (; c + 2 * kLanes <= vectors * kLanes; c += 2 * kLanes) {
    tiles<2, kAdd>(a, stride_a, rows, b + c, stride_b, depth, out + c, stride_out);
  }
  if (c < vectors * kLanes) {
    tiles<1, kAdd>(a, stride_a, rows, b + c, stride_b, depth, out + c, stride_out);
  }
}

inline void fill(float* to, int64_t n, float value) {
  for (int64_t j = 0; j < n; ++j) to[j] = value;
}

// Up to kQueries queries of one head.
inline void attend(const float* query, int64_t stride_query, int64_t queries, const float* packed,
                   const Head& head, float* out, int64_t stride_out, float* logsumexp,
                   Memory& memory) {
  const int64_t width = head.padded_size();
  float* scores = memory.take(kQueries * (kKeys + width + 2));
  float* sums = scores + kQueries * kKeys;
  float* maximum = sums + kQueries * width;
  float* total = maximum + kQueries;
  fill(sums, kQueries * width, 0.0f);
  fill(maximum, kQueries, kMinusInfinity);
  fill(total, kQueries, 0.0f);
  const float* values = packed + head.padded_keys() * head.size;
  for (int64_t first = 0; first < head.keys; first += kKeys) {
    const int64_t keys = least(kKeys, head.keys - first);
    for (int64_t j = 0; j < keys; j += kPanel) {
      for (int64_t k = 0; k < head.size; k += kScoreDepth) {
        const int64_t depth = least(kScoreDepth, head.size - k);
        const float* panel = packed + (first + j) * head.size + k * kPanel;
        if (k == 0) {
          tiles<kPanelVectors, Plus::kNothing>(query, stride_query, queries, panel, kPanel, depth,
                                               scores + j, kKeys);
        } else {
          tiles<kPanelVectors, Plus::kOutput>(query + k, stride_query, queries, panel, kPanel,
                                              depth, scores + j, kKeys);
        }
      }
    }
    const int64_t padded = parts_of(keys, 4 * kLanes) * 4 * kLanes;
    for (int64_t i = 0; i < queries; ++i) {
      float* own = scores + i * kKeys;
      fill(own + keys, padded - keys, kMinusInfinity);
      const float scale = weigh(own, padded, maximum + i, total + i);
      if (scale != 1.0f) scale_row(sums + i * width, width, scale);
    }
    add_product(scores, kKeys, queries, values + first * width, width, keys, sums, width,
                width / kLanes);
  }
  for (int64_t i = 0; i < queries; ++i) {
    scale_row(sums + i * width, head.size, 1.0f / total[i]);
    std::memcpy(out + i * stride_out, sums + i * width, head.size * sizeof(float));
    logsumexp[i] = kLn2 * (maximum[i] + log2f(total[i]));
  }
}

}  // namespace

// Floats of `packed` below, a row and a head.
TIUE_FUNCTION(int64_t, attention_memory)(int64_t head_size, int64_t keys) {
  return Head{head_size, keys}.floats();
}

// query [rows, queries, heads * size], key and value [shared, keys, heads * size] with shared =
// rows / K or rows, each at two strides -> out [rows, queries, heads * size] and the logarithm of
// every query's sum of exponentials [rows, heads, queries].
TIUE_FUNCTION(void, attention)
(const float* query, int64_t query_row, int64_t query_token, const float* key, int64_t key_row,
 int64_t key_token, const float* value, int64_t value_row, int64_t value_token, int64_t rows,
 int64_t shared, int64_t queries, int64_t keys, int64_t heads, int64_t size, double scale,
 float* packed, float* out, float* logsumexp) {
  const Head head{size, keys};
  const int64_t channels = heads * size;
  parallel_for(shared * heads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / heads, column = task % heads * size;
      pack_head(key + row * key_row + column, value + row * value_row + column, key_token,
                value_token, head, static_cast<float>(scale / kLn2), packed + task * head.floats());
    }
  });
  const int64_t blocks = parts_of(queries, kQueries);
  parallel_for(rows * heads * blocks, [&](int64_t begin, int64_t end) {
    Memory memory;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / (heads * blocks), h = task / blocks % heads;
      const int64_t first = task % blocks * kQueries;
      attend(query + row * query_row + first * query_token + h * size, query_token,
             least(kQueries, queries - first), packed + (row % shared * heads + h) * head.floats(),
             head, out + (row * queries + first) * channels + h * size, channels,
             logsumexp + (row * heads + h) * queries + first, memory);
    }
  });
}
