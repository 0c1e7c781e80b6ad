// Products of float32 matrices: tiles of results stay in registers (6 x 16 with AVX2, 16 x 16 with
// AVX-512), the right matrix is read in panels of 16 columns. Where the right matrix is made in
// that order anyway, there is nothing to pack, and narrow ones run faster than in MKL.
#pragma once

#include "vector.h"

namespace {

constexpr int64_t kPanel = 16;  // columns of a panel
// A panel of this depth (10 KB) stays in the L1 cache, this many rows of it (120 KB) in L2. Sums of
// 320 have twice the error of MKL's.
constexpr int64_t kDepth = 160, kRows = 192;

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

// The last columns of a matrix, fewer than a panel, by way of whole rows of one.
inline void multiply_last(const float* a, int64_t stride_a, int64_t rows, const float* panel,
                          int64_t columns, int64_t depth, float* out, int64_t stride_out) {
  float whole[kMostRows * kPanel];
  for (int64_t r = 0; r < rows; r += kMostRows) {
    const int64_t n = least(kMostRows, rows - r);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const float* from = a + r * stride_a + k;
      const int64_t part = least(kDepth, depth - k);
      if (k == 0) {
        tiles<kPanelVectors, Plus::kNothing>(from, stride_a, n, panel, kPanel, part, whole, kPanel);
      } else {
        tiles<kPanelVectors, Plus::kOutput>(from, stride_a, n, panel + k * kPanel, kPanel, part,
                                            whole, kPanel);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        out[(r + i) * stride_out + j] = whole[i * kPanel + j];
      }
    }
  }
}

// out[rows][columns] = a[rows][depth] * panels; panels [panels_of(columns)][depth][16] holds the
// right matrix.
inline void multiply(const float* a, int64_t stride_a, int64_t rows, const float* panels,
                     int64_t columns, int64_t depth, float* out, int64_t stride_out) {
  const int64_t whole = columns / kPanel;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t n = least(kRows, rows - row);
    const float* from = a + row * stride_a;
    float* to = out + row * stride_out;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = least(kDepth, depth - k);
      for (int64_t p = 0; p < whole; ++p) {
        const float* panel = panels + (p * depth + k) * kPanel;
        if (k == 0) {
          tiles<kPanelVectors, Plus::kNothing>(from, stride_a, n, panel, kPanel, part,
                                               to + p * kPanel, stride_out);
        } else {
          tiles<kPanelVectors, Plus::kOutput>(from + k, stride_a, n, panel, kPanel, part,
                                              to + p * kPanel, stride_out);
        }
      }
    }
    if (whole * kPanel < columns) {
      multiply_last(from, stride_a, n, panels + whole * depth * kPanel, columns - whole * kPanel,
                    depth, to + whole * kPanel, stride_out);
    }
  }
}

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
