#include "product.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace tiue {

#if TIUE_PRODUCTS

namespace {

// A panel of this depth (10 KB) stays in the L1 cache, this many rows of it (120 KB) in L2. Sums of
// 320 have twice the error of MKL's.
constexpr int64_t kDepth = 160, kRows = 192;
constexpr int kTileRows = 6;
constexpr int kTileVectors = static_cast<int>(kPanel) / kLanes;

// One panel and a part of the depth for up to kRows rows.
TIUE_AVX2 void multiply_panel(const float* a, int64_t stride_a, int64_t rows, const float* panel,
                              int64_t depth, bool first, float* out, int64_t stride_out) {
  if (first) {
    tiles<kTileRows, kTileVectors, Plus::kNothing>(a, stride_a, rows, panel, kPanel, depth, out,
                                                   stride_out);
  } else {
    tiles<kTileRows, kTileVectors, Plus::kOutput>(a, stride_a, rows, panel, kPanel, depth, out,
                                                  stride_out);
  }
}

// The last columns of a matrix, fewer than a panel, by way of a whole tile.
TIUE_AVX2 void multiply_last(const float* a, int64_t stride_a, int64_t rows, const float* panel,
                             int64_t columns, int64_t depth, float* out, int64_t stride_out) {
  float whole[kTileRows * kPanel];
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int64_t n = std::min<int64_t>(kTileRows, rows - r);
    tiles<kTileRows, kTileVectors, Plus::kNothing>(a + r * stride_a, stride_a, n, panel, kPanel,
                                                   depth, whole, kPanel);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        out[(r + i) * stride_out + j] = whole[i * kPanel + j];
      }
    }
  }
}

}  // namespace

void multiply(const float* a, int64_t stride_a, int64_t rows, const float* panels, int64_t columns,
              int64_t depth, float* out, int64_t stride_out) {
  const int64_t whole = columns / kPanel;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t n = std::min(kRows, rows - row);
    const float* from = a + row * stride_a;
    float* to = out + row * stride_out;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k);
      for (int64_t p = 0; p < whole; ++p) {
        multiply_panel(from + k, stride_a, n, panels + (p * depth + k) * kPanel, part, k == 0,
                       to + p * kPanel, stride_out);
      }
    }
    if (whole * kPanel < columns) {
      multiply_last(from, stride_a, n, panels + whole * depth * kPanel, columns - whole * kPanel,
                    depth, to + whole * kPanel, stride_out);
    }
  }
}

TIUE_AVX2 void pack_transposed(const float* rows, int64_t stride, int64_t n, int64_t depth,
                               float factor, float* panel) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + i] = factor * rows[i * stride + k];
  }
  for (int64_t i = n; i < kPanel; ++i) {
    for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + i] = 0.0f;
  }
}

#else

void multiply(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t) {}
void pack_transposed(const float*, int64_t, int64_t, int64_t, float, float*) {}

#endif

bool products_available() { return products_serve(); }

}  // namespace tiue

STABLE_TORCH_LIBRARY_IMPL(tiue_cpu, CompositeExplicitAutograd, m) {
  m.impl("products_available", TORCH_BOX(&tiue::products_available));
}
