// The transforms of Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2015, arXiv 1509.09308).
//
// Maps are NCHW float32 of any size; tiles of 4 x 4 outputs that stick out are cut. Every loop that
// counts runs over neighbouring tiles or channels, so that it is vectorised.
#pragma once

#include "product.h"

namespace {

constexpr int kTile = 4;                  // outputs of a tile along one axis
constexpr int kInput = kTile + 2;         // inputs that they need
constexpr int kPoints = kInput * kInput;  // products of a tile
constexpr int64_t kChannels = 32;         // channels of a weight transformed together
constexpr float kSixth = 1.0f / 6.0f;

inline int64_t tiles_along(int64_t size) { return parts_of(size, kTile); }

struct Map {
  int64_t rows, channels, height, width;
  int64_t tiles_y() const { return tiles_along(height); }
  int64_t tiles_x() const { return tiles_along(width); }
  int64_t tiles() const { return rows * tiles_y() * tiles_x(); }
};

// B^T d for one axis, elementwise over n columns: six rows to six rows.
inline void transform_input(const float* const in[kInput], float* const out[kInput], int64_t n) {
  const float *d0 = in[0], *d1 = in[1], *d2 = in[2], *d3 = in[3], *d4 = in[4], *d5 = in[5];
  float *o0 = out[0], *o1 = out[1], *o2 = out[2], *o3 = out[3], *o4 = out[4], *o5 = out[5];
  TIUE_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float even = d4[j] - 4 * d2[j], odd = d3[j] - 4 * d1[j];
    const float even2 = d4[j] - d2[j], odd2 = 2 * (d3[j] - d1[j]);
    o0[j] = 4 * d0[j] - 5 * d2[j] + d4[j];
    o5[j] = 4 * d1[j] - 5 * d3[j] + d5[j];
    o1[j] = even + odd;
    o2[j] = even - odd;
    o3[j] = even2 + odd2;
    o4[j] = even2 - odd2;
  }
}

// A^T m for one axis: six rows to four.
TIUE_INLINE void transform_output(const float* const in[kInput], float* const out[kTile],
                                  int64_t n) {
  const float *m0 = in[0], *m1 = in[1], *m2 = in[2], *m3 = in[3], *m4 = in[4], *m5 = in[5];
  float *o0 = out[0], *o1 = out[1], *o2 = out[2], *o3 = out[3];
  TIUE_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float sum = m1[j] + m2[j], difference = m1[j] - m2[j];
    const float sum2 = m3[j] + m4[j], difference2 = m3[j] - m4[j];
    o0[j] = m0[j] + sum + sum2;
    o1[j] = difference + 2 * difference2;
    o2[j] = sum + 4 * sum2;
    o3[j] = difference + 8 * difference2 + m5[j];
  }
}

// G g for one axis: three taps to six. Divisions would take half of the time.
TIUE_INLINE void transform_taps(const float* const in[3], float* const out[kInput], int64_t n) {
  const float *g0 = in[0], *g1 = in[1], *g2 = in[2];
  float *o0 = out[0], *o1 = out[1], *o2 = out[2], *o3 = out[3], *o4 = out[4], *o5 = out[5];
  TIUE_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float outer = -kSixth * (g0[j] + g2[j]), outer2 = kSixth * (0.25f * g0[j] + g2[j]);
    const float inner = kSixth * g1[j], inner2 = 0.5f * inner;
    o0[j] = 0.25f * g0[j];
    o1[j] = outer - inner;
    o2[j] = outer + inner;
    o3[j] = outer2 + inner2;
    o4[j] = outer2 - inner2;
    o5[j] = g2[j];
  }
}

// A strip, the tiles of one row of them, of a channel x [H, W]: to 36 planes, `plane` apart.
class InputStrip {
 public:
  InputStrip(const Map& map, Memory& memory)
      : map_(map), columns_(map.tiles_x()), width_(kTile * columns_ + kInput) {
    // Rows of the map with a border of zeros, which nobody writes, after the vertical transform,
    // and taken apart into the four columns of a tile: column m of tile j at [m][j].
    float* own = memory.take_zeros((2 * kInput + 1) * width_ + 2 * kInput * (columns_ + 2));
    for (int a = 0; a < kInput; ++a) {
      padded_[a] = own + a * width_;
      vertical_[a] = own + (kInput + a) * width_;
    }
    for (int m = 0; m < kTile; ++m) {
      apart_[m] = own + 2 * kInput * width_ + m * (columns_ + 2);
    }
  }

  void operator()(const float* x, int64_t tile_row, float* out, int64_t plane) const {
    for (int a = 0; a < kInput; ++a) {
      const int64_t y = tile_row * kTile + a - 1;
      if (y >= 0 && y < map_.height) {
        std::memcpy(padded_[a] + 1, x + y * map_.width, map_.width * sizeof(float));
      } else {
        std::memset(padded_[a] + 1, 0, map_.width * sizeof(float));
      }
    }
    transform_input(padded_, vertical_, width_);
    for (int a = 0; a < kInput; ++a) {
      for (int64_t j = 0; j <= columns_; ++j) {
        for (int m = 0; m < kTile; ++m) apart_[m][j] = vertical_[a][kTile * j + m];
      }
      const float* in[kInput] = {apart_[0], apart_[1],     apart_[2],
                                 apart_[3], apart_[0] + 1, apart_[1] + 1};
      float* to[kInput];
      for (int b = 0; b < kInput; ++b) to[b] = out + (kInput * a + b) * plane;
      transform_input(in, to, columns_);
    }
  }

 private:
  const Map map_;
  const int64_t columns_, width_;
  float *padded_[kInput], *vertical_[kInput], *apart_[kTile];
};

// n input channels of one output channel: taps [n][9] to 36 planes [.., n].
TIUE_INLINE void some_weight_channels(const float* taps, int64_t n, float* out, int64_t plane) {
  float apart[9][kChannels], vertical[kInput][3][kChannels];
  for (int64_t c = 0; c < n; ++c) {
    for (int tap = 0; tap < 9; ++tap) apart[tap][c] = taps[9 * c + tap];
  }
  for (int x = 0; x < 3; ++x) {
    const float* in[3] = {apart[x], apart[3 + x], apart[6 + x]};
    float* to[kInput];
    for (int a = 0; a < kInput; ++a) to[a] = vertical[a][x];
    transform_taps(in, to, n);
  }
  for (int a = 0; a < kInput; ++a) {
    const float* in[3] = {vertical[a][0], vertical[a][1], vertical[a][2]};
    float* to[kInput];
    for (int b = 0; b < kInput; ++b) to[b] = out + (kInput * a + b) * plane;
    transform_taps(in, to, n);
  }
}

// The same for any number: loops of a constant length take a third less time.
inline void weight_channels(const float* taps, int64_t n, float* out, int64_t plane) {
  int64_t c = 0;
  for (; c + kChannels <= n; c += kChannels) {
    some_weight_channels(taps + 9 * c, kChannels, out + c, plane);
  }
  if (c < n) some_weight_channels(taps + 9 * c, n - c, out + c, plane);
}

}  // namespace
