// Products of float32 matrices for CPUs with AVX2 and without AVX-512: tiles of 6 x 16 results stay
// in registers, the right matrix is read in panels of 16 columns. Where the right matrix is made in
// that order anyway, there is nothing to pack, and narrow ones run faster than in MKL.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TIUE_PRODUCTS 1
// What calls a tile must itself be compiled for AVX2: lambdas are not, so they call such functions.
#define TIUE_AVX2 __attribute__((target("avx2,fma")))
#define TIUE_INLINE inline __attribute__((always_inline))
#else
#define TIUE_PRODUCTS 0
#endif

namespace tiue {

constexpr int64_t kPanel = 16;  // columns of a panel

// Whether the functions below run here, and are faster than the library that torch calls.
inline bool products_serve() {
#if TIUE_PRODUCTS
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         !__builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

#if TIUE_PRODUCTS

using Vector = float __attribute__((vector_size(32), aligned(4)));
constexpr int kLanes = 8;

TIUE_AVX2 TIUE_INLINE Vector load(const float* from) {
  return *reinterpret_cast<const Vector*>(from);
}
TIUE_AVX2 TIUE_INLINE void store(float* to, Vector value) {
  *reinterpret_cast<Vector*>(to) = value;
}

enum class Plus { kNothing, kOutput };

// out[Rows][8 * Vectors] = a[Rows][depth] * b[depth][8 * Vectors], plus what out holds. That is
// added last: sums of short sums lose fewer digits.
template <int Rows, int Vectors, Plus plus>
TIUE_AVX2 TIUE_INLINE void tile(const float* a, int64_t stride_a, const float* b, int64_t stride_b,
                                int64_t depth, float* out, int64_t stride_out) {
  Vector sum[Rows][Vectors];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) column[v] = load(b + k * stride_b + kLanes * v);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const float factor = a[r * stride_a + k];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] += factor * column[v];
    }
  }
#pragma GCC unroll 12
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
template <int Rows, int Vectors, Plus plus>
TIUE_AVX2 inline void tiles(const float* a, int64_t stride_a, int64_t rows, const float* b,
                            int64_t stride_b, int64_t depth, float* out, int64_t stride_out) {
  int64_t r = 0;
  for (; r + Rows <= rows; r += Rows) {
    tile<Rows, Vectors, plus>(a + r * stride_a, stride_a, b, stride_b, depth, out + r * stride_out,
                              stride_out);
  }
  for (; r < rows; ++r) {
    tile<1, Vectors, plus>(a + r * stride_a, stride_a, b, stride_b, depth, out + r * stride_out,
                           stride_out);
  }
}

#endif

// out[rows][columns] = a[rows][depth] * panels; panels [panels_of(columns)][depth][16] holds the
// right matrix.
void multiply(const float* a, int64_t stride_a, int64_t rows, const float* panels, int64_t columns,
              int64_t depth, float* out, int64_t stride_out);

// Rows [n][depth] of a matrix, n <= 16, as one panel [depth][16] of its transpose, zeros after n.
void pack_transposed(const float* rows, int64_t stride, int64_t n, int64_t depth, float factor,
                     float* panel);

}  // namespace tiue
