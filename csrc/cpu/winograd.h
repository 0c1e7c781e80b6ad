// What the transforms of Winograd's F(4 x 4, 3 x 3) share with their backward passes.
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

// Where a tile's value of one channel and one of the 36 points goes: into planes [C, tiles], or,
// for our own products, into panels [panels, C, 16 tiles].
struct Inputs {
  float* data;
  int64_t channels, tiles;
  bool panels;

  int64_t of_point() const { return channels * (panels ? panels_of(tiles) * kPanel : tiles); }

  // The values of n tiles from `first` on.
  void write(int point, int64_t channel, int64_t first, const float* values, int64_t n) const {
    float* to = data + point * of_point();
    if (!panels) {
      std::memcpy(to + channel * tiles + first, values, n * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < n;) {
      const int64_t tile = first + i, lane = tile % kPanel, some = least(kPanel - lane, n - i);
      std::memcpy(to + (tile / kPanel * channels + channel) * kPanel + lane, values + i,
                  some * sizeof(float));
      i += some;
    }
  }
};

// Every channel of every row of x [R, C, H, W], transformed, into planes or panels.
// transform(channel, map, planes, memory) writes the 36 planes [tiles of the row] of one.
template <class Transform>
inline void transform_channels(const float* x, const Map& map, const Inputs& out,
                               Transform transform) {
  const int64_t of_row = map.tiles_y() * map.tiles_x();
  parallel_for(map.rows * map.channels, [&](int64_t begin, int64_t end) {
    Memory memory, whole;
    float* planes = whole.take(kPoints * of_row);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / map.channels, channel = index % map.channels;
      transform(x + index * map.height * map.width, map, planes, memory);
      for (int point = 0; point < kPoints; ++point) {
        out.write(point, channel, row * of_row, planes + point * of_row, of_row);
      }
    }
  });
}

}  // namespace
