// Which channels and pixels a block and its threads work on; shared by forward and backward.
//
// An item is one row of the hidden part, or of the skip part, and a bundle of groups that lie side
// by side: one group where maps are contiguous, enough to fill whole vectors where they are
// channels_last. An item too large for shared memory is cut into chunks, of channels (contiguous)
// or of pixels (channels_last), one block each.
#pragma once

#include "../common/launch.h"

namespace tiue::skip_norm {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / 32;

struct Geometry {
  int rows, batch;                        // K*B and B
  int channels, hidden_channels, border;  // border: first channel of the skip part, c0
  int groups, hidden_groups, group_size;
  int pixels;
  int bundle;  // groups in one item
  int hidden_bundles, skip_bundles;
  int chunks, chunk_size;  // channels (contiguous) or pixels (channels_last)
};

// A rectangle of one row: channels [channel, channel_end) by pixels [pixel, pixel_end).
struct Range {
  int row;  // of the hidden part, or of the skip part
  bool in_skip;
  int group, group_end;
  int channel, channel_end, pixel, pixel_end;
};

template <bool kChannelsLast>
__device__ __forceinline__ Range find_range(const Geometry& g, int64_t item, int chunk) {
  int64_t hidden_items = static_cast<int64_t>(g.rows) * g.hidden_bundles;
  Range range;
  range.in_skip = item >= hidden_items;
  if (range.in_skip) item -= hidden_items;
  int bundles = range.in_skip ? g.skip_bundles : g.hidden_bundles;
  range.row = static_cast<int>(item / bundles);
  range.group = (range.in_skip ? g.hidden_groups : 0) + static_cast<int>(item % bundles) * g.bundle;
  range.group_end = min(range.group + g.bundle, range.in_skip ? g.groups : g.hidden_groups);
  range.channel = range.group * g.group_size;
  range.channel_end = range.group_end * g.group_size;
  range.pixel = 0;
  range.pixel_end = g.pixels;
  if (kChannelsLast) {
    range.pixel = chunk * g.chunk_size;
    range.pixel_end = min(range.pixel + g.chunk_size, g.pixels);
  } else {
    range.channel += chunk * g.chunk_size;
    range.channel_end = min(range.channel + g.chunk_size, range.channel_end);
  }
  return range;
}

// Where a channel and pixel of a row lie, in a map of so many channels.
template <bool kChannelsLast>
__device__ __forceinline__ int64_t offset(const Geometry& g, int row, int map_channels, int channel,
                                          int pixel) {
  int64_t row_begin = static_cast<int64_t>(row) * map_channels * g.pixels;
  return row_begin + (kChannelsLast ? static_cast<int64_t>(pixel) * map_channels + channel
                                    : static_cast<int64_t>(channel) * g.pixels + pixel);
}

// The input at a channel of concat(hidden, skip): the skip's row is the hidden row % B.
template <bool kChannelsLast, typename T>
__device__ __forceinline__ T* locate_input(const Geometry& g, const Range& range, T* hidden,
                                           T* skip, int channel, int pixel) {
  if (channel < g.hidden_channels) {
    return hidden + offset<kChannelsLast>(g, range.row, g.hidden_channels, channel, pixel);
  }
  int skip_channels = g.channels - g.hidden_channels;
  return skip + offset<kChannelsLast>(g, range.row % g.batch, skip_channels,
                                      channel - g.hidden_channels, pixel);
}

template <bool kChannelsLast, typename T>
__device__ __forceinline__ T* locate_output(const Geometry& g, const Range& range, T* hidden_out,
                                            T* skip_out, int channel, int pixel) {
  if (!range.in_skip)
    return hidden_out + offset<kChannelsLast>(g, range.row, g.border, channel, pixel);
  return skip_out +
         offset<kChannelsLast>(g, range.row, g.channels - g.border, channel - g.border, pixel);
}

// Walks the vectors of a range that belong to this thread, kBatch loads in flight: contiguous, a
// warp takes a channel and its lanes the pixels; channels_last, a thread keeps its channels and
// walks down the pixels. begin(channel) and end(channel) enclose each channel, slot numbers the
// vectors of the range.
template <bool kChannelsLast, int kVector, int kBatch, typename Begin, typename Load, typename Use,
          typename End>
__device__ __forceinline__ void walk(const Range& range, Begin begin, Load load, Use use, End end) {
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int per_pixel = (range.channel_end - range.channel) / kVector;
  int pixels = range.pixel_end - range.pixel;
  int channel, channel_step, pixel, pixel_step;
  if (kChannelsLast) {
    int lanes = threads / per_pixel;
    channel = range.channel + thread % per_pixel * kVector;
    channel_step = range.channel_end;
    pixel = thread / per_pixel;
    pixel_step = lanes;
    if (pixel >= lanes) return;
  } else {
    channel = range.channel + thread / 32;
    channel_step = threads / 32;
    pixel = thread % 32 * kVector;
    pixel_step = 32 * kVector;
  }
  for (; channel < range.channel_end; channel += channel_step) {
    begin(channel);
    for (int first = pixel; first < pixels; first += kBatch * pixel_step) {
      decltype(load(0, 0, 0)) loaded[kBatch];
      int slot = kChannelsLast ? first * per_pixel + (channel - range.channel) / kVector
                               : ((channel - range.channel) * pixels + first) / kVector;
      int slot_step = kChannelsLast ? pixel_step * per_pixel : 32;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int at = first + i * pixel_step;
        if (at < pixels) loaded[i] = load(channel, range.pixel + at, slot + i * slot_step);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int at = first + i * pixel_step;
        if (at < pixels) use(channel, range.pixel + at, slot + i * slot_step, loaded[i]);
      }
    }
    end(channel);
  }
}

// Host side: how a call is cut into blocks.
struct Plan {
  Geometry geometry;
  bool channels_last;
  int vector;  // elements a load
  int threads;
  bool resident;  // an item fits in shared memory: each input is read once
  size_t bundle_channels;
  // A block takes whole pixels of an item; only a group of thousands of channels is too wide.
  bool too_wide() const {
    return channels_last && bundle_channels > static_cast<size_t>(kMaxThreads) * vector;
  }
  int64_t items() const {
    const Geometry& g = geometry;
    return static_cast<int64_t>(g.rows) * g.hidden_bundles +
           static_cast<int64_t>(g.batch) * g.skip_bundles;
  }
};

inline Geometry make_geometry(const Tensor& hidden, const Tensor& skip, int64_t num_groups) {
  Geometry g{};
  g.rows = static_cast<int>(hidden.size(0));
  g.batch = static_cast<int>(skip.size(0));
  g.hidden_channels = static_cast<int>(hidden.size(1));
  g.channels = g.hidden_channels + static_cast<int>(skip.size(1));
  g.groups = static_cast<int>(num_groups);
  g.group_size = g.channels / g.groups;
  g.hidden_groups = ceil_div(g.hidden_channels, g.group_size);
  g.border = g.hidden_groups * g.group_size;
  g.pixels = static_cast<int>(hidden.size(2) * hidden.size(3));
  return g;
}

// `copies`: maps of one item that are held at once (1 forward, 2 backward). `scratch_bytes`: of
// shared memory beside them.
template <typename ScratchBytes>
Plan make_plan(const Geometry& geometry, bool channels_last, bool aligned, size_t element_bytes,
               int copies, size_t shared_bytes, ScratchBytes scratch_bytes) {
  Plan plan{geometry, channels_last};
  Geometry& g = plan.geometry;
  auto divides = [&](int vector) {
    if (!channels_last) return g.pixels % vector == 0;
    return g.hidden_channels % vector == 0 && g.border % vector == 0 && g.channels % vector == 0;
  };
  int widest = static_cast<int>(16 / element_bytes);
  plan.vector = !aligned ? 1 : divides(widest) ? widest : widest == 8 && divides(4) ? 4 : 1;
  g.bundle = 1;
  if (channels_last) {
    g.bundle = plan.vector / std::gcd(g.group_size, plan.vector);
    // 128 bytes side by side in a pixel keep whole sectors busy.
    while (g.bundle < g.groups && g.bundle * g.group_size * element_bytes < 128 &&
           2 * g.bundle * g.group_size <= kMaxThreads * plan.vector) {
      g.bundle *= 2;
    }
  }
  g.hidden_bundles = ceil_div(g.hidden_groups, g.bundle);
  g.skip_bundles = ceil_div(g.groups - g.hidden_groups, g.bundle);
  plan.bundle_channels = static_cast<size_t>(g.bundle) * g.group_size;

  size_t item_bytes = plan.bundle_channels * g.pixels * element_bytes * copies;
  plan.resident = item_bytes + scratch_bytes(plan) <= shared_bytes;
  int whole = channels_last ? g.pixels : g.group_size;
  // Contiguous: a channel a warp. channels_last: about 64 KiB a block.
  int wanted = channels_last ? static_cast<int>(65536 / (plan.bundle_channels * element_bytes)) + 1
                             : kMaxWarps;
  g.chunks = plan.resident ? 1 : ceil_div(whole, wanted);
  g.chunk_size = ceil_div(whole, g.chunks);
  g.chunks = ceil_div(whole, g.chunk_size);
  // Contiguous: as many warps as share the channels evenly.
  plan.threads =
      channels_last ? kMaxThreads : 32 * ceil_div(g.chunk_size, ceil_div(g.chunk_size, kMaxWarps));
  return plan;
}

inline bool is_channels_last(const Tensor& tensor) {
  auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (int axis : {1, 3, 2, 0}) {
    if (sizes[axis] != 1 && strides[axis] != expected) return false;
    expected *= sizes[axis];
  }
  return !tensor.is_contiguous();
}

inline Tensor in_format(const Tensor& map, bool channels_last) {
  return torch::stable::contiguous(
      map, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Brings the maps, `hidden` first, into the memory format of `hidden` and plans for it; into the
// contiguous one where a group is too wide for channels_last.
template <typename ScratchBytes>
Plan arrange(const Geometry& geometry, std::vector<Tensor*> maps, int copies, size_t shared_bytes,
             ScratchBytes scratch_bytes) {
  bool channels_last = is_channels_last(*maps[0]);
  auto plan_for = [&](bool last) {
    bool aligned = true;
    for (Tensor* map : maps) {
      *map = in_format(*map, last);
      aligned = aligned && is_aligned(*map, 16);
    }
    return make_plan(geometry, last, aligned, maps[0]->element_size(), copies, shared_bytes,
                     scratch_bytes);
  };
  Plan plan = plan_for(channels_last);
  if (plan.too_wide()) plan = plan_for(false);
  return plan;
}

// Calls function(T{}, integral_constant<kVector>, bool_constant<kChannelsLast>).
template <typename Function>
void dispatch_plan(const Tensor& tensor, const Plan& plan, Function function) {
  dispatch_float(tensor, [&](auto zero) {
    using T = decltype(zero);
    auto with_vector = [&](auto vector) {
      if (plan.channels_last) {
        function(zero, vector, std::true_type{});
      } else {
        function(zero, vector, std::false_type{});
      }
    };
    if (plan.vector == 1) return with_vector(std::integral_constant<int, 1>{});
    if constexpr (sizeof(T) == 2) {
      if (plan.vector == 8) return with_vector(std::integral_constant<int, 8>{});
    }
    with_vector(std::integral_constant<int, 4>{});
  });
}

inline Tensor new_map(const Tensor& like, int64_t rows, int64_t channels, bool channels_last) {
  return torch::stable::empty(
      {rows, channels, like.size(2), like.size(3)}, like.scalar_type(), std::nullopt, like.device(),
      std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace tiue::skip_norm
