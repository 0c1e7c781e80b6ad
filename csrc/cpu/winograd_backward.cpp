// The backward passes of the transforms in winograd.cpp: each is the transpose of one of them, so
// that the gradients take four times fewer multiplications than those of the convolution, too.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "winograd.h"

namespace tiue {
namespace {

using torch::stable::Tensor;

// A y for one axis, elementwise over n columns: four rows to six.
inline void transform_output_backward(const float* const in[kTile], float* const out[kInput],
                                      int64_t n) {
  const float *y0 = in[0], *y1 = in[1], *y2 = in[2], *y3 = in[3];
  float *o0 = out[0], *o1 = out[1], *o2 = out[2], *o3 = out[3], *o4 = out[4], *o5 = out[5];
#pragma GCC ivdep
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
#pragma GCC ivdep
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
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const float sum = -kSixth * (u1[j] + u2[j]), difference = kSixth * (u2[j] - u1[j]);
    const float sum2 = kSixth * (u3[j] + u4[j]), difference2 = kSixth * (u3[j] - u4[j]);
    g0[j] = 0.25f * (u0[j] + sum2) + sum;
    g1[j] = difference + 0.5f * difference2;
    g2[j] = sum + sum2 + u5[j];
  }
}

// One channel of one row of a gradient, y [H, W], to its 36 planes [tiles of the row].
TIUE_CLONES void output_channel_backward(const float* y, const Map& map, float* out,
                                         std::vector<float>& memory) {
  const int64_t columns = map.tiles_x(), width = kTile * columns, plane = map.tiles_y() * columns;
  // Rows of the map, zeros where tiles stick out, taken apart into the four columns of a tile.
  memory.assign(static_cast<size_t>(width + (kTile * kTile + kInput * kTile) * columns), 0.0f);
  float* line = memory.data();
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
TIUE_CLONES void input_channel_backward(const float* in, int64_t plane, const Map& map, float* out,
                                        std::vector<float>& memory) {
  // A row is kept taken apart: column 4 j + m, counted from the border of zeros, at [m][j].
  const int64_t columns = map.tiles_x(), wide = columns + 1, row_size = kTile * wide;
  memory.assign(static_cast<size_t>(kInput * columns + (2 * kInput + 3) * row_size), 0.0f);
  float* across = memory.data();                  // [6][columns]
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
TIUE_CLONES void weight_channels_backward(const float* in, int64_t plane, int64_t n, float* taps) {
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

}  // namespace

// grad_out [R, C, H, W] -> [36, C, tiles of all rows].
Tensor winograd_output_backward(Tensor grad_out) {
  const Map map{grad_out.size(0), grad_out.size(1), grad_out.size(2), grad_out.size(3)};
  const int64_t tiles = map.tiles();
  Tensor out = torch::stable::new_empty(grad_out, {kPoints, map.channels, tiles});
  const Inputs grads{static_cast<float*>(out.data_ptr()), map.channels, tiles, false};
  transform_channels(static_cast<const float*>(grad_out.data_ptr()), map, grads,
                     output_channel_backward);
  return out;
}

// grads [36, n, tiles of r rows] -> rows first_row to first_row + r and channels first_channel to
// first_channel + n of grad_x [R, C, H, W].
void winograd_input_backward(Tensor grads, Tensor grad_x, int64_t first_row,
                             int64_t first_channel) {
  const int64_t height = grad_x.size(2), width = grad_x.size(3), channels = grad_x.size(1);
  const int64_t of_row = tiles_along(height) * tiles_along(width), tiles = grads.size(2);
  const Map map{tiles / of_row, grads.size(1), height, width};
  const float* data = static_cast<const float*>(grads.data_ptr());
  float* to = static_cast<float*>(grad_x.data_ptr());
  torch::stable::parallel_for(0, map.rows * map.channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / map.channels, channel = index % map.channels;
      input_channel_backward(
          data + channel * tiles + row * of_row, map.channels * tiles, map,
          to + ((first_row + row) * channels + first_channel + channel) * height * width, memory);
    }
  });
}

// grads [36, n, C] -> rows first_output to first_output + n of grad_weight [C_out, C, 3, 3], which
// may be a slice of the input channels of a larger one.
void winograd_weight_backward(Tensor grads, Tensor grad_weight, int64_t first_output) {
  const int64_t outputs = grads.size(1), channels = grads.size(2);
  const int64_t stride = grad_weight.stride(0);
  const float* data = static_cast<const float*>(grads.data_ptr());
  float* to = static_cast<float*>(grad_weight.data_ptr()) + first_output * stride;
  torch::stable::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t c = 0; c < channels; c += kChannels) {
        weight_channels_backward(data + o * channels + c, outputs * channels,
                                 std::min(kChannels, channels - c), to + o * stride + c * 9);
      }
    }
  });
}

}  // namespace tiue

STABLE_TORCH_LIBRARY_IMPL(tiue_cpu, CPU, m) {
  m.impl("winograd_output_backward", TORCH_BOX(&tiue::winograd_output_backward));
  m.impl("winograd_input_backward", TORCH_BOX(&tiue::winograd_input_backward));
  m.impl("winograd_weight_backward", TORCH_BOX(&tiue::winograd_weight_backward));
}
