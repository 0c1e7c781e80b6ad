// Products of float32 matrices: tiles of results stay in registers (6 x 16 with AVX2, 16 x 16 with
// AVX-512), the right matrix is read in panels of 16 columns. Where the right matrix is made in
// that order anyway, there is nothing to pack, and narrow ones run faster than in MKL.
#pragma once

#include "vector.h"

namespace {

constexpr int64_t kPanel = 16;  // columns of a panel
// A panel of this depth (10 KB) stays in the L1 cache. Sums of 320 have twice the error of MKL's.
constexpr int64_t kDepth = 160;

TIUE_INLINE int64_t panels_of(int64_t columns) { return parts_of(columns, kPanel); }

enum class Plus { kNothing, kOutput };

// out[Rows][kLanes * Vectors] = a[Rows][depth] * b[depth][kLanes * Vectors], plus what out holds.
// That is added last: sums of short sums lose fewer digits.
template <int Rows, int Vectors, Plus plus>
TIUE_INLINE void tile(const float* a, int64_t stride_a, const float* b, int64_t stride_b,
                      int64_t depth, float* out, int64_t stride_out) {
  Vector sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) column[v] = load(b + k * stride_b + kLanes * v);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const float factor = a[r * stride_a + k];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] += factor * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      float* to = out + r * stride_out + kLanes * v;
      if constexpr (plus == Plus::kOutput) sum[r][v] += load(to);
      store(to, sum[r][v]);
    }
  }
}

// The same for any number of rows.
template <int Vectors, Plus plus>
inline void tiles(const float* a, int64_t stride_a, int64_t rows, const float* b, int64_t stride_b,
                  int64_t depth, float* out, int64_t stride_out) {
  constexpr int kFit = kSums / Vectors, kTileRows = kFit < kMostRows ? kFit : kMostRows;
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    tile<kTileRows, Vectors, plus>(a + r * stride_a, stride_a, b, stride_b, depth,
                                   out + r * stride_out, stride_out);
  }
  if constexpr (kTileRows > 4) {
    for (; r + 4 <= rows; r += 4) {
      tile<4, Vectors, plus>(a + r * stride_a, stride_a, b, stride_b, depth, out + r * stride_out,
                             stride_out);
    }
  }
  for (; r < rows; ++r) {
    tile<1, Vectors, plus>(a + r * stride_a, stride_a, b, stride_b, depth, out + r * stride_out,
                           stride_out);
  }
}

constexpr int kPanelVectors = static_cast<int>(kPanel) / kLanes;

// Rows [n][depth] of a matrix, n <= 16, as one panel [depth][16] of its transpose, zeros after n.
inline void pack_transposed(const float* rows, int64_t stride, int64_t n, int64_t depth,
                            float factor, float* panel) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + i] = factor * rows[i * stride + k];
  }
  for (int64_t i = n; i < kPanel; ++i) {
    for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + i] = 0.0f;
  }
}

}  // namespace
