// The backward passes of the transforms in winograd.cpp: each is the transpose of one of them, so
// that the gradients take four times fewer multiplications than those of the convolution, too.

#include "winograd.h"

namespace {

// A y for one axis, elementwise over n columns: four rows to six.
inline void transform_output_backward(const float* const in[kTile], float* const out[kInput],
                                      int64_t n) {
  const float *y0 = in[0], *y1 = in[1], *y2 = in[2], *y3 = in[3];
  float *o0 = out[0], *o1 = out[1], *o2 = out[2], *o3 = out[3], *o4 = out[4], *o5 = out[5];
  TIUE_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float even = y0[j] + y2[j], odd = y1[j] + y3[j];
    const float even2 = y0[j] + 4 * y2[j], odd2 = 2 * y1[j] + 8 * y3[j];
    o0[j] = y0[j];
    o1[j] = even + odd;
    o2[j] = even - odd;
    o3[j] = even2 + odd2;
    o4[j] = even2 - odd2;
    o5[j] = y3[j];
  }
}

// B v for one axis: six rows to six.
inline void transform_input_backward(const float* const in[kInput], float* const out[kInput],
                                     int64_t n) {
  const float *v0 = in[0], *v1 = in[1], *v2 = in[2], *v3 = in[3], *v4 = in[4], *v5 = in[5];
  float *o0 = out[0], *o1 = out[1], *o2 = out[2], *o3 = out[3], *o4 = out[4], *o5 = out[5];
  TIUE_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float sum = v1[j] + v2[j], difference = v1[j] - v2[j];
    const float sum2 = v3[j] + v4[j], difference2 = 2 * (v3[j] - v4[j]);
    o0[j] = 4 * v0[j];
    o1[j] = 4 * (v5[j] - difference) - difference2;
    o2[j] = -5 * v0[j] - 4 * sum - sum2;
    o3[j] = difference + difference2 - 5 * v5[j];
    o4[j] = v0[j] + sum + sum2;
    o5[j] = v5[j];
  }
}

// G^T u for one axis: six rows to three taps.
inline void transform_taps_backward(const float* const in[kInput], float* const out[3], int64_t n) {
  const float *u0 = in[0], *u1 = in[1], *u2 = in[2], *u3 = in[3], *u4 = in[4], *u5 = in[5];
  float *g0 = out[0], *g1 = out[1], *g2 = out[2];
  TIUE_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    const float sum = -kSixth * (u1[j] + u2[j]), difference = kSixth * (u2[j] - u1[j]);
    const float sum2 = kSixth * (u3[j] + u4[j]), difference2 = kSixth * (u3[j] - u4[j]);
    g0[j] = 0.25f * (u0[j] + sum2) + sum;
    g1[j] = difference + 0.5f * difference2;
    g2[j] = sum + sum2 + u5[j];
  }
}

// One channel of one row of a gradient, y [H, W], to its 36 planes [tiles of the row].
inline void output_channel_backward(const float* y, const Map& map, float* out, int64_t plane,
                                    Memory& memory) {
  const int64_t columns = map.tiles_x(), width = kTile * columns;
  // Rows of the map, zeros where tiles stick out, taken apart into the four columns of a tile.
  float* line = memory.take_zeros(width + (kTile * kTile + kInput * kTile) * columns);
  float* apart = line + width;                        // [4][4][columns]
  float* vertical = apart + kTile * kTile * columns;  // [6][4][columns]
  for (int64_t ty = 0; ty < map.tiles_y(); ++ty) {
    for (int p = 0; p < kTile; ++p) {
      const int64_t row = ty * kTile + p;
      if (row < map.height) {
        std::memcpy(line, y + row * map.width, map.width * sizeof(float));
      } else {
        std::memset(line, 0, map.width * sizeof(float));
      }
      for (int64_t j = 0; j < columns; ++j) {
        for (int m = 0; m < kTile; ++m) apart[(kTile * p + m) * columns + j] = line[kTile * j + m];
      }
    }
    const float* in[kTile];
    float* to[kInput];
    for (int p = 0; p < kTile; ++p) in[p] = apart + kTile * p * columns;
    for (int a = 0; a < kInput; ++a) to[a] = vertical + kTile * a * columns;
    transform_output_backward(in, to, kTile * columns);
    for (int a = 0; a < kInput; ++a) {
      for (int m = 0; m < kTile; ++m) in[m] = vertical + (kTile * a + m) * columns;
      for (int b = 0; b < kInput; ++b) to[b] = out + (kInput * a + b) * plane + ty * columns;
      transform_output_backward(in, to, columns);
    }
  }
}

// The 36 planes of one channel of one row to the gradient of its inputs [H, W]: windows overlap by
// two rows and two columns, which are added up.
inline void input_channel_backward(const float* in, int64_t plane, const Map& map, float* out,
                                   Memory& memory) {
  // A row is kept taken apart: column 4 j + m, counted from the border of zeros, at [m][j].
  const int64_t columns = map.tiles_x(), wide = columns + 1, row_size = kTile * wide;
  float* across =  // [6][columns]
      memory.take_zeros(kInput * columns + (2 * kInput + 3) * row_size);
  float* horizontal = across + kInput * columns;  // [6 rows of a tile][4][columns + 1]
  float* vertical = horizontal + kInput * row_size;
  float* carry = vertical + kInput * row_size;  // the last two rows of the tiles above
  float* line = carry + 2 * row_size;
  const auto write = [&](int64_t y, const float* row) {
    if (y < 0 || y >= map.height) return;
    for (int64_t j = 0; j < wide; ++j) {
      for (int m = 0; m < kTile; ++m) line[kTile * j + m] = row[m * wide + j];
    }
    std::memcpy(out + y * map.width, line + 1, map.width * sizeof(float));
  };
  for (int64_t ty = 0; ty < map.tiles_y(); ++ty) {
    for (int a = 0; a < kInput; ++a) {
      const float* from[kInput];
      float* to[kInput];
      for (int b = 0; b < kInput; ++b) {
        from[b] = in + (kInput * a + b) * plane + ty * columns;
        to[b] = across + b * columns;
      }
      transform_input_backward(from, to, columns);
      float* row = horizontal + a * row_size;
      for (int m = 0; m < kTile; ++m) {
        std::memcpy(row + m * wide, to[m], columns * sizeof(float));
        row[m * wide + columns] = 0;
      }
      for (int m = 0; m < 2; ++m) {
        for (int64_t j = 0; j < columns; ++j) row[m * wide + j + 1] += to[kTile + m][j];
      }
    }
    const float* from[kInput];
    float* to[kInput];
    for (int a = 0; a < kInput; ++a) {
      from[a] = horizontal + a * row_size;
      to[a] = vertical + a * row_size;
    }
    transform_input_backward(from, to, row_size);
    for (int64_t j = 0; j < 2 * row_size; ++j) {
      vertical[j] += carry[j];
      carry[j] = vertical[kTile * row_size + j];
    }
    for (int p = 0; p < kTile; ++p) write(ty * kTile + p - 1, vertical + p * row_size);
  }
  for (int p = 0; p < 2; ++p) write(map.tiles_y() * kTile + p - 1, carry + p * row_size);
}

// Up to kChannels input channels of one output channel: 36 planes [.., n] to taps [n][9].
inline void weight_channels_backward(const float* in, int64_t plane, int64_t n, float* taps) {
  float horizontal[kInput][3][kChannels], apart[9][kChannels];
  for (int a = 0; a < kInput; ++a) {
    const float* from[kInput];
    float* to[3];
    for (int b = 0; b < kInput; ++b) from[b] = in + (kInput * a + b) * plane;
    for (int x = 0; x < 3; ++x) to[x] = horizontal[a][x];
    transform_taps_backward(from, to, n);
  }
  for (int x = 0; x < 3; ++x) {
    const float* from[kInput];
    float* to[3];
    for (int a = 0; a < kInput; ++a) from[a] = horizontal[a][x];
    for (int y = 0; y < 3; ++y) to[y] = apart[3 * y + x];
    transform_taps_backward(from, to, n);
  }
  for (int64_t c = 0; c < n; ++c) {
    for (int tap = 0; tap < 9; ++tap) taps[9 * c + tap] = apart[tap][c];
  }
}

// Every channel of every row of x [R, C, H, W] to 36 planes [C, tiles].
// transform(channel, map, planes, memory) writes the 36 planes [tiles of the row] of one.
template <class Transform>
inline void transform_channels(const float* x, const Map& map, float* out, Transform transform) {
  const int64_t of_row = map.tiles_y() * map.tiles_x();
  parallel_for(map.rows * map.channels, [&](int64_t begin, int64_t end) {
    Memory memory;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / map.channels, channel = index % map.channels;
      transform(x + index * map.height * map.width, map, out + channel * map.tiles() + row * of_row,
                map.channels * map.tiles(), memory);
    }
  });
}

}  // namespace

// x [rows, channels, height, width] -> out [36, channels, tiles of all rows].
TIUE_FUNCTION(void, winograd_input)
(const float* x, int64_t rows, int64_t channels, int64_t height, int64_t width, float* out) {
  const Map map{rows, channels, height, width};
  transform_channels(
      x, map, out, [](const float* from, const Map& of, float* to, int64_t plane, Memory& memory) {
        const InputStrip transform(of, memory);
        for (int64_t ty = 0; ty < of.tiles_y(); ++ty)
          transform(from, ty, to + ty * of.tiles_x(), plane);
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

// grad_out [rows, channels, height, width] -> out [36, channels, tiles of all rows].
TIUE_FUNCTION(void, winograd_output_backward)
(const float* grad_out, int64_t rows, int64_t channels, int64_t height, int64_t width, float* out) {
  const Map map{rows, channels, height, width};
  transform_channels(grad_out, map, out, output_channel_backward);
}

// grads [36, some, tiles of some rows] -> those rows of grad_x [.., channels, height, width], the
// channels from `first` on.
TIUE_FUNCTION(void, winograd_input_backward)
(const float* grads, int64_t rows, int64_t some, int64_t channels, int64_t height, int64_t width,
 int64_t first, float* grad_x) {
  const Map map{rows, some, height, width};
  const int64_t of_row = map.tiles_y() * map.tiles_x(), tiles = map.tiles();
  parallel_for(rows * some, [&](int64_t begin, int64_t end) {
    Memory memory;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / some, channel = index % some;
      input_channel_backward(grads + channel * tiles + row * of_row, some * tiles, map,
                             grad_x + (row * channels + first + channel) * height * width, memory);
    }
  });
}

// grads [36, outputs, channels] -> grad_weight [outputs, channels, 3, 3], outputs `stride` apart.
TIUE_FUNCTION(void, winograd_weight_backward)
(const float* grads, int64_t outputs, int64_t channels, int64_t stride, float* grad_weight) {
  parallel_for(outputs, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t c = 0; c < channels; c += kChannels) {
        weight_channels_backward(grads + o * channels + c, outputs * channels,
                                 least(kChannels, channels - c), grad_weight + o * stride + c * 9);
      }
    }
  });
}
