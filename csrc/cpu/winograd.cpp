// 3 x 3 convolutions of stride 1 as Winograd's F(4 x 4, 3 x 3) (Lavin and Gray 2015,
// arXiv 1509.09308): the transforms. Between them the caller multiplies 36 pairs of matrices, four
// times fewer multiplications than the convolution has.
//
// Maps are NCHW float32 of any size; tiles of 4 x 4 outputs that stick out are cut. Every loop that
// counts runs over neighbouring tiles or channels, so that it is vectorised.
#include "winograd.h"

namespace {

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
inline void transform_output(const float* const in[kInput], float* const out[kTile], int64_t n) {
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
inline void transform_taps(const float* const in[3], float* const out[kInput], int64_t n) {
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

// One channel of one row, x [H, W], to its 36 planes [tiles of the row], one after another.
inline void input_channel(const float* x, const Map& map, float* out, Memory& memory) {
  const int64_t columns = map.tiles_x(), width = kTile * columns + kInput;
  const int64_t plane = map.tiles_y() * columns;
  // Rows of the map with a border of zeros, after the vertical transform, and taken apart into
  // the four columns of a tile: column m of tile j at [m][j].
  float* own = memory.take_zeros((2 * kInput + 1) * width + 2 * kInput * (columns + 2));
  float *padded[kInput], *vertical[kInput], *apart[kTile];
  for (int a = 0; a < kInput; ++a) {
    padded[a] = own + a * width;
    vertical[a] = own + (kInput + a) * width;
  }
  for (int m = 0; m < kTile; ++m) {
    apart[m] = own + 2 * kInput * width + m * (columns + 2);
  }
  for (int64_t ty = 0; ty < map.tiles_y(); ++ty) {
    for (int a = 0; a < kInput; ++a) {
      const int64_t y = ty * kTile + a - 1;
      if (y >= 0 && y < map.height) {
        std::memcpy(padded[a] + 1, x + y * map.width, map.width * sizeof(float));
      } else {
        std::memset(padded[a] + 1, 0, map.width * sizeof(float));
      }
    }
    transform_input(padded, vertical, width);
    for (int a = 0; a < kInput; ++a) {
      for (int64_t j = 0; j <= columns; ++j) {
        for (int m = 0; m < kTile; ++m) apart[m][j] = vertical[a][kTile * j + m];
      }
      const float* in[kInput] = {apart[0], apart[1],     apart[2],
                                 apart[3], apart[0] + 1, apart[1] + 1};
      float* to[kInput];
      for (int b = 0; b < kInput; ++b) to[b] = out + (kInput * a + b) * plane + ty * columns;
      transform_input(in, to, columns);
    }
  }
}

// The 36 planes [C, tiles] of one channel of one row to its outputs [H, W].
inline void output_channel(const float* in, int64_t plane, const Map& map, float bias, float* out,
                           Memory& memory) {
  const int64_t columns = map.tiles_x();
  float* horizontal =  // [6][4][columns]
      memory.take((kInput * kTile + kTile * kTile + kTile) * columns);
  float* vertical = horizontal + kInput * kTile * columns;  // [4][4][columns]
  float* line = vertical + kTile * kTile * columns;
  for (int64_t ty = 0; ty < map.tiles_y(); ++ty) {
    for (int a = 0; a < kInput; ++a) {
      const float* from[kInput];
      float* to[kTile];
      for (int b = 0; b < kInput; ++b) from[b] = in + (kInput * a + b) * plane + ty * columns;
      for (int m = 0; m < kTile; ++m) to[m] = horizontal + (kTile * a + m) * columns;
      transform_output(from, to, columns);
    }
    for (int m = 0; m < kTile; ++m) {
      const float* from[kInput];
      float* to[kTile];
      for (int a = 0; a < kInput; ++a) from[a] = horizontal + (kTile * a + m) * columns;
      for (int p = 0; p < kTile; ++p) to[p] = vertical + (kTile * p + m) * columns;
      transform_output(from, to, columns);
    }
    const int64_t last = least(kTile, map.height - ty * kTile);
    for (int64_t p = 0; p < last; ++p) {
      const float* from = vertical + kTile * p * columns;
      for (int64_t j = 0; j < columns; ++j) {
        for (int m = 0; m < kTile; ++m) line[kTile * j + m] = from[m * columns + j] + bias;
      }
      std::memcpy(out + (ty * kTile + p) * map.width, line, map.width * sizeof(float));
    }
  }
}

// Up to kChannels input channels of one output channel: taps [n][9] to 36 planes [.., n].
inline void weight_channels(const float* taps, int64_t n, float* out, int64_t plane) {
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

// Bijections of 64 bits (the finaliser of MurmurHash3).
inline uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 33)) * 0xff51afd7ed558ccdu;
  value = (value ^ (value >> 33)) * 0xc4ceb9fe1a85ec53u;
  return value ^ (value >> 33);
}

inline uint64_t fingerprint_row(const float* row, int64_t n) {
  constexpr int kChains = 64;
  uint32_t lanes[kChains];
  for (int lane = 0; lane < kChains; ++lane) lanes[lane] = 0x811c9dc5u + lane;
  int64_t i = 0;
  for (; i + kChains <= n; i += kChains) {
    uint32_t bits[kChains];
    std::memcpy(bits, row + i, sizeof(bits));
    for (int lane = 0; lane < kChains; ++lane) {
      const uint32_t turned = lanes[lane] << 5 | lanes[lane] >> 27;
      lanes[lane] = (turned ^ bits[lane]) * 0x9e3779b1u;
    }
  }
  uint64_t result = static_cast<uint64_t>(n);
  for (; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, row + i, sizeof(bits));
    result = mix(result ^ bits);
  }
  for (int lane = 0; lane < kChains; lane += 2) {
    result = mix(result ^ (static_cast<uint64_t>(lanes[lane]) << 32 | lanes[lane + 1]));
  }
  return result;
}

}  // namespace

// x [rows, channels, height, width] -> out [36, channels, tiles of all rows], or
// [36, panels, channels, 16] for winograd_product.
TIUE_FUNCTION(void, winograd_input)
(const float* x, int64_t rows, int64_t channels, int64_t height, int64_t width, int64_t panels,
 float* out) {
  const Map map{rows, channels, height, width};
  transform_channels(x, map, Inputs{out, channels, map.tiles(), panels != 0}, input_channel);
}

// weights [36, outputs, depth] and panels [36, panels, depth, 16] of some tiles -> out
// [36, outputs, tiles].
TIUE_FUNCTION(void, winograd_product)
(const float* weights, const float* panels, int64_t outputs, int64_t depth, int64_t tiles,
 float* out) {
  const int64_t of_point = parts_of(outputs, kRows);
  parallel_for(kPoints * of_point, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t point = task / of_point, row = task % of_point * kRows;
      multiply(weights + (point * outputs + row) * depth, depth, least(kRows, outputs - row),
               panels + point * panels_of(tiles) * depth * kPanel, tiles, depth,
               out + (point * outputs + row) * tiles, tiles);
    }
  });
}

// products [36, some, tiles of some rows] -> those rows of out [.., channels, height, width], the
// channels from `first` on, plus bias [channels], which may be null.
TIUE_FUNCTION(void, winograd_output)
(const float* products, int64_t rows, int64_t some, const float* bias, int64_t channels,
 int64_t height, int64_t width, int64_t first, float* out) {
  const Map map{rows, some, height, width};
  const int64_t of_row = map.tiles_y() * map.tiles_x(), tiles = map.tiles();
  parallel_for(rows * some, [&](int64_t begin, int64_t end) {
    Memory memory;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / some, channel = index % some, target = first + channel;
      output_channel(products + channel * tiles + row * of_row, some * tiles, map,
                     bias == nullptr ? 0.0f : bias[target],
                     out + (row * channels + target) * height * width, memory);
    }
  });
}

// weight [outputs, channels, 3, 3], outputs `stride` apart -> out [36, outputs, channels].
TIUE_FUNCTION(void, winograd_weight)
(const float* weight, int64_t stride, int64_t outputs, int64_t channels, float* out) {
  parallel_for(outputs, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t c = 0; c < channels; c += kChannels) {
        weight_channels(weight + o * stride + c * 9, least(kChannels, channels - c),
                        out + o * channels + c, outputs * channels);
      }
    }
  });
}

// 64 bits of the contents of a weight [outputs, channels, 3, 3], outputs `stride` apart, for a
// cache that cannot be stale. Every step is a bijection of its chain of 32 bits and of its element,
// so one changed element always changes the result.
TIUE_FUNCTION(int64_t, winograd_fingerprint)
(const float* weight, int64_t stride, int64_t outputs, int64_t channels) {
  Memory memory;  // 64 bits an output
  float* parts = memory.take(2 * outputs);
  parallel_for(outputs, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const uint64_t part = fingerprint_row(weight + o * stride, channels * 9);
      std::memcpy(parts + 2 * o, &part, sizeof(part));
    }
  });
  uint64_t result = 0x9e3779b97f4a7c15u;
  for (int64_t o = 0; o < outputs; ++o) {
    uint64_t part;
    std::memcpy(&part, parts + 2 * o, sizeof(part));
    result = mix(result ^ part);
  }
  return static_cast<int64_t>(result);
}
