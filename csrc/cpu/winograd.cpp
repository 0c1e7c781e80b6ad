// 3 x 3 convolutions of stride 1 as Winograd's F(4 x 4, 3 x 3), with a quarter of the
// multiplications. Weights are transformed where they are multiplied, some outputs and channels at
// a time, so that neither they nor the products ever lie in memory: to read a weight and transform
// it takes no longer than to read one that is transformed already, of four times the size (1280
// channels of 4 rows of 8 x 8: 34 ms of CPU time, and 41 with the transformed weight kept).
#include "winograd.h"

namespace {

// Outputs of a task, whole tiles of rows of `tile`, and channels of a step: the weights of all 36
// points (740 KB with AVX-512) stay in the L2 cache.
constexpr int64_t kOutputs = kMostRows >= 16 ? 32 : 24;
// Points lie so far apart: a line more, lest all 36 meet in one set of the cache.
constexpr int64_t kWeights = kOutputs * kDepth + kPanel;

// Some strips (rows of tiles) of a batch of maps, all maps' one after the other.
struct Strips {
  Map map;
  int64_t first, count;

  int64_t row(int64_t strip) const { return (first + strip) / map.tiles_y(); }
  int64_t tile_row(int64_t strip) const { return (first + strip) % map.tiles_y(); }
  int64_t panels() const { return panels_of(count * map.tiles_x()); }
};

// The products of 16 tiles from `tile` on, points `plane` apart, to where they lie in an output
// [.., outputs, H, W], of which `out` is the channel in the first row.
TIUE_INLINE void output_panel(const float* in, int64_t plane, const Strips& strips, int64_t tile,
                              float bias, float* out, int64_t stride_row) {
  float horizontal[kInput][kTile][kPanel], vertical[kTile][kTile][kPanel];
  for (int a = 0; a < kInput; ++a) {
    const float* from[kInput];
    float* to[kTile];
    for (int b = 0; b < kInput; ++b) from[b] = in + (kInput * a + b) * plane;
    for (int m = 0; m < kTile; ++m) to[m] = horizontal[a][m];
    transform_output(from, to, kPanel);
  }
  for (int m = 0; m < kTile; ++m) {
    const float* from[kInput];
    float* to[kTile];
    for (int a = 0; a < kInput; ++a) from[a] = horizontal[a][m];
    for (int p = 0; p < kTile; ++p) to[p] = vertical[p][m];
    transform_output(from, to, kPanel);
  }
  float lines[kTile][kTile * kPanel];
  for (int p = 0; p < kTile; ++p) {
    for (int64_t j = 0; j < kPanel; ++j) {
      for (int m = 0; m < kTile; ++m) lines[p][kTile * j + m] = vertical[p][m][j] + bias;
    }
  }
  const int64_t columns = strips.map.tiles_x(), tiles = strips.count * columns;
  const int64_t height = strips.map.height, width = strips.map.width;
  for (int64_t done = 0; done < kPanel && tile + done < tiles;) {
    const int64_t strip = (tile + done) / columns, column = (tile + done) % columns;
    const int64_t n = least(kPanel - done, columns - column);
    const int64_t y = strips.tile_row(strip) * kTile, x = column * kTile;
    float* to = out + strips.row(strip) * stride_row + y * width + x;
    const size_t bytes = least(n * kTile, width - x) * sizeof(float);
    for (int64_t p = 0; p < least(kTile, height - y); ++p) {
      std::memcpy(to + p * width, lines[p] + kTile * done, bytes);
    }
    done += n;
  }
}

}  // namespace

// Strips of x [.., channels, height, width] -> out [36, steps of channels, panels, channels of a
// step, 16], zeros after the last tile.
TIUE_FUNCTION(void, winograd_panels)
(const float* x, int64_t channels, int64_t height, int64_t width, int64_t first, int64_t count,
 float* out) {
  const Strips strips{{0, channels, height, width}, first, count};
  const int64_t columns = strips.map.tiles_x(), panels = strips.panels();
  const int64_t size = height * width, plane = panels * kPanel;
  parallel_for(channels, [&](int64_t begin, int64_t end) {
    Memory scratch, whole;
    const InputStrip transform(strips.map, scratch);
    float* planes = whole.take_zeros(kPoints * plane);
    for (int64_t channel = begin; channel < end; ++channel) {
      for (int64_t i = 0; i < count; ++i) {
        transform(x + (strips.row(i) * channels + channel) * size, strips.tile_row(i),
                  planes + i * columns, plane);
      }
      const int64_t k = channel % kDepth, c = channel - k, depth = least(kDepth, channels - c);
      for (int point = 0; point < kPoints; ++point) {
        float* to = out + (point * channels + c) * plane + k * kPanel;
        for (int64_t p = 0; p < panels; ++p) {
          std::memcpy(to + p * depth * kPanel, planes + point * plane + p * kPanel,
                      kPanel * sizeof(float));
        }
      }
    }
  });
}

// weight [outputs, channels, 3, 3], outputs `stride` apart, and the panels of some strips -> those
// strips of out [.., outputs, height, width], plus bias [outputs], which may be null.
TIUE_FUNCTION(void, winograd_forward)
(const float* weight, int64_t stride, int64_t outputs, int64_t channels, const float* panels,
 const float* bias, int64_t height, int64_t width, int64_t first, int64_t count, float* out) {
  const Strips strips{{0, outputs, height, width}, first, count};
  const int64_t n_panels = strips.panels(), size = height * width;
  const int64_t plane = n_panels * kOutputs * kPanel + kPanel;  // a line more, as above
  parallel_for(parts_of(outputs, kOutputs), [&](int64_t begin, int64_t end) {
    Memory for_weights, for_products;
    float* weights = for_weights.take(kPoints * kWeights);  // [36, outputs, channels]
    float* products = for_products.take(kPoints * plane);   // [36, panels, outputs, 16]
    for (int64_t block = begin; block < end; ++block) {
      const int64_t o = block * kOutputs, n = least(kOutputs, outputs - o);
      for (int64_t c = 0; c < channels; c += kDepth) {
        const int64_t depth = least(kDepth, channels - c);
        for (int64_t i = 0; i < n; ++i) {
          weight_channels(weight + (o + i) * stride + c * 9, depth, weights + i * kDepth, kWeights);
        }
        for (int64_t point = 0; point < kPoints; ++point) {
          const float* left = weights + point * kWeights;
          const float* right = panels + (point * channels + c) * n_panels * kPanel;
          float* to = products + point * plane;
          for (int64_t p = 0; p < n_panels; ++p) {
            if (c == 0) {
              tiles<kPanelVectors, Plus::kNothing>(left, kDepth, n, right, kPanel, depth, to,
                                                   kPanel);
            } else {
              tiles<kPanelVectors, Plus::kOutput>(left, kDepth, n, right, kPanel, depth, to,
                                                  kPanel);
            }
            right += depth * kPanel;
            to += kOutputs * kPanel;
          }
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t p = 0; p < n_panels; ++p) {
          output_panel(products + (p * kOutputs + i) * kPanel, plane, strips, p * kPanel,
                       bias == nullptr ? 0.0f : bias[o + i], out + (o + i) * size, outputs * size);
        }
      }
    }
  });
}
