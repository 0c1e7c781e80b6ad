// What the transforms of Winograd's F(4 x 4, 3 x 3) share with their backward passes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "product.h"

// One library for every CPU: the loader picks the widest form that runs here.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TIUE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TIUE_CLONES
#endif

namespace tiue {

constexpr int kTile = 4;                  // outputs of a tile along one axis
constexpr int kInput = kTile + 2;         // inputs that they need
constexpr int kPoints = kInput * kInput;  // products of a tile
constexpr int64_t kChannels = 32;         // channels of a weight transformed together
constexpr float kSixth = 1.0f / 6.0f;

inline int64_t tiles_along(int64_t size) { return (size + kTile - 1) / kTile; }

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
      const int64_t tile = first + i, lane = tile % kPanel, some = std::min(kPanel - lane, n - i);
      std::memcpy(to + (tile / kPanel * channels + channel) * kPanel + lane, values + i,
                  some * sizeof(float));
      i += some;
    }
  }
};

}  // namespace tiue
