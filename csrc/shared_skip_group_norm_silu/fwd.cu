#include "../ops.h"
#include "geometry.h"

namespace tiue {
namespace skip_norm {

namespace {

template <typename T>
struct ForwardParams {
  Geometry geometry;
  const T* hidden;
  const T* skip;
  T* hidden_out;
  T* skip_out;
  FloatArray weight, bias;
  float eps;
  float* hidden_stats;  // [2, K*B, hidden groups]: mean, then 1 / standard deviation
  float* skip_stats;    // [2, B, skip groups]
  float* partial;       // [items, chunks, bundle, 2]: mean and sum of squares about it
};

// Loads in flight a thread.
constexpr int kBatch = 4;

enum class Pass { kWhole, kStatistics, kApply };

// Sums over each group of the block's range what its threads hold per channel; every thread may
// read `sums` afterwards. `scratch` holds one value a thread and vector element.
template <bool kChannelsLast, int kVector>
__device__ void group_sums(const Geometry& g, const Range& range, const float (&values)[kVector],
                           float* scratch, float* sums) {
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int warp = thread / 32, lane = thread % 32, warps = threads / 32;
  if constexpr (kChannelsLast) {
    int channels = range.channel_end - range.channel;
    int lanes = threads / (channels / kVector);
    if (thread < lanes * (channels / kVector)) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) scratch[thread * kVector + i] = values[i];
    }
    __syncthreads();
    for (int group = warp; group < range.group_end - range.group; group += warps) {
      float sum = 0.0f;
      for (int i = lane; i < lanes * g.group_size; i += 32) {
        sum += scratch[i / g.group_size * channels + group * g.group_size + i % g.group_size];
      }
      sum = warp_sum(sum);
      if (lane == 0) sums[group] = sum;
    }
  } else {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += values[i];
    sum = warp_sum(sum);
    if (lane == 0) scratch[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      sum = warp_sum(lane < warps ? scratch[lane] : 0.0f);
      if (lane == 0) sums[0] = sum;
    }
  }
  __syncthreads();
}

// One block normalises one chunk of an item. Each thread keeps a running mean and sum of squares
// about it per vector element (Welford); they are merged through the weighted mean of the means, so
// that nothing cancels however far the mean is from zero. kWhole holds the item in shared memory
// between statistics and normalisation; the other two passes read the maps twice.
template <typename T, int kVector, bool kChannelsLast, Pass kPass>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(ForwardParams<T> params) {
  using Vec = Vector<T, kVector>;
  const Geometry& g = params.geometry;
  int64_t item = blockIdx.x / g.chunks;
  int chunk = static_cast<int>(blockIdx.x % g.chunks);
  Range range = find_range<kChannelsLast>(g, item, chunk);
  int bundle_channels = g.bundle * g.group_size;
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  // kMaxThreads * kVector floats of scratch, later scale and shift of every channel.
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float* mean_of = scratch + max(kMaxThreads * kVector, 2 * bundle_channels);
  float* squares_of = mean_of + g.bundle;
  // The item starts at a multiple of 16 bytes.
  Vec* held = reinterpret_cast<Vec*>(mean_of + (2 * g.bundle + 3) / 4 * 4);
  float* partial = params.partial + (item * g.chunks + chunk) * g.bundle * 2;

  auto load_input = [&](int channel, int pixel, int) {
    return load_vector<kVector>(
        locate_input<kChannelsLast>(g, range, params.hidden, params.skip, channel, pixel));
  };

  if constexpr (kPass != Pass::kApply) {
    float mean[kVector] = {}, squares[kVector] = {};
    float count = 0.0f;
    walk<kChannelsLast, kVector, kBatch>(
        range, [](int) {}, load_input,
        [&](int, int, int slot, const Vec& x) {
          if constexpr (kPass == Pass::kWhole) held[slot] = x;
          count += 1.0f;
          float share = 1.0f / count;
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            float value = to_float(x.data[i]), delta = value - mean[i];
            mean[i] += delta * share;
            squares[i] += delta * (value - mean[i]);
          }
        },
        [](int) {});
    float values[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = count * mean[i];
    group_sums<kChannelsLast>(g, range, values, scratch, mean_of);
    int width = kChannelsLast ? g.group_size : range.channel_end - range.channel;
    float share = 1.0f / (static_cast<float>(width) * (range.pixel_end - range.pixel));
    int channel =
        kChannelsLast ? thread % ((range.channel_end - range.channel) / kVector) * kVector : 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      int group = kChannelsLast ? (channel + i) / g.group_size : 0;
      float delta = mean[i] - mean_of[group] * share;
      values[i] = squares[i] + count * delta * delta;
    }
    group_sums<kChannelsLast>(g, range, values, scratch, squares_of);
    if (thread < range.group_end - range.group) {
      mean_of[thread] *= share;
      if constexpr (kPass == Pass::kStatistics) {
        partial[2 * thread] = mean_of[thread];
        partial[2 * thread + 1] = squares_of[thread];
      }
    }
    if constexpr (kPass == Pass::kStatistics) return;
  } else if (thread < range.group_end - range.group) {
    const float* first = params.partial + item * g.chunks * g.bundle * 2 + 2 * thread;
    int whole = kChannelsLast ? g.pixels : g.group_size;
    float mean = 0.0f, squares = 0.0f;
    for (int i = 0; i < g.chunks; ++i) {
      float size = static_cast<float>(min(g.chunk_size, whole - i * g.chunk_size));
      mean += first[i * g.bundle * 2] * (size / whole);
    }
    int others = kChannelsLast ? g.group_size : g.pixels;
    for (int i = 0; i < g.chunks; ++i) {
      float size = static_cast<float>(min(g.chunk_size, whole - i * g.chunk_size)) * others;
      float delta = first[i * g.bundle * 2] - mean;
      squares += first[i * g.bundle * 2 + 1] + size * delta * delta;
    }
    mean_of[thread] = mean;
    squares_of[thread] = squares;
  }
  __syncthreads();

  float share = 1.0f / (static_cast<float>(g.group_size) * g.pixels);
  float* scale_of = scratch;
  float* shift_of = scratch + bundle_channels;
  for (int i = thread; i < range.channel_end - range.channel; i += threads) {
    int channel = range.channel + i;
    int group = channel / g.group_size - range.group;
    float rstd = rsqrtf(squares_of[group] * share + params.eps);
    scale_of[i] = rstd * params.weight[channel];
    shift_of[i] = params.bias[channel] - mean_of[group] * scale_of[i];
  }
  if (chunk == 0 && thread < range.group_end - range.group) {
    int groups = range.in_skip ? g.groups - g.hidden_groups : g.hidden_groups;
    int group = range.group + thread - (range.in_skip ? g.hidden_groups : 0);
    float* stats = range.in_skip ? params.skip_stats : params.hidden_stats;
    int64_t at = static_cast<int64_t>(range.row) * groups + group;
    stats[at] = mean_of[thread];
    stats[at + static_cast<int64_t>(range.in_skip ? g.batch : g.rows) * groups] =
        rsqrtf(squares_of[thread] * share + params.eps);
  }
  __syncthreads();

  constexpr int kCoefficients = kChannelsLast ? kVector : 1;
  float scale[kCoefficients], shift[kCoefficients];
  walk<kChannelsLast, kVector, kBatch>(
      range,
      [&](int channel) {
#pragma unroll
        for (int i = 0; i < kCoefficients; ++i) {
          scale[i] = scale_of[channel - range.channel + i];
          shift[i] = shift_of[channel - range.channel + i];
        }
      },
      [&](int channel, int pixel, int slot) {
        if constexpr (kPass == Pass::kWhole) return held[slot];
        return load_input(channel, pixel, slot);
      },
      [&](int channel, int pixel, int, const Vec& x) {
        Vec y;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          int c = kChannelsLast ? i : 0;
          float z = fmaf(to_float(x.data[i]), scale[c], shift[c]);
          y.data[i] = from_float<T>(z * sigmoid<T>(z));
        }
        store_vector(locate_output<kChannelsLast>(g, range, params.hidden_out, params.skip_out,
                                                  channel, pixel),
                     y);
      },
      [](int) {});
}

size_t forward_scratch_bytes(const Plan& plan) {
  size_t scratch = std::max<size_t>(kMaxThreads * plan.vector, 2 * plan.bundle_channels);
  return (scratch + (2 * plan.geometry.bundle + 3) / 4 * 4) * sizeof(float);
}

}  // namespace
}  // namespace skip_norm

Tensors4 shared_skip_group_norm_silu_fwd(Tensor hidden, Tensor skip, int64_t num_groups,
                                         Tensor weight, Tensor bias, double eps) {
  using namespace skip_norm;
  Device device(hidden);
  Geometry geometry = make_geometry(hidden, skip, num_groups);
  bool channels_last = is_channels_last(hidden);
  Plan plan = arrange(geometry, {&hidden, &skip}, 1, device.shared_bytes(), forward_scratch_bytes);
  const Geometry& g = plan.geometry;
  Tensor hidden_out = new_map(hidden, g.rows, g.border, plan.channels_last);
  Tensor skip_out = new_map(hidden, g.batch, g.channels - g.border, plan.channels_last);
  Tensor hidden_stats = new_float(hidden, {2, g.rows, g.hidden_groups});
  Tensor skip_stats = new_float(hidden, {2, g.batch, g.groups - g.hidden_groups});
  int64_t blocks = plan.items() * g.chunks;
  Tensor partial = new_float(hidden, {plan.resident ? 0 : blocks * g.bundle * 2});
  dispatch_plan(hidden, plan, [&](auto zero, auto vector, auto last) {
    using T = decltype(zero);
    constexpr int kVector = decltype(vector)::value;
    constexpr bool kLast = decltype(last)::value;
    ForwardParams<T> params{g,
                            data<T>(hidden),
                            data<T>(skip),
                            data<T>(hidden_out),
                            data<T>(skip_out),
                            float_array(weight),
                            float_array(bias),
                            static_cast<float>(eps),
                            data<float>(hidden_stats),
                            data<float>(skip_stats),
                            data<float>(partial)};
    size_t scratch = forward_scratch_bytes(plan);
    if (plan.resident) {
      size_t held = plan.bundle_channels * g.pixels * sizeof(T);
      device.launch(forward_kernel<T, kVector, kLast, Pass::kWhole>, blocks, plan.threads,
                    scratch + held, params);
    } else {
      device.launch(forward_kernel<T, kVector, kLast, Pass::kStatistics>, blocks, plan.threads,
                    scratch, params);
      device.launch(forward_kernel<T, kVector, kLast, Pass::kApply>, blocks, plan.threads, scratch,
                    params);
    }
  });
  return {in_format(hidden_out, channels_last), in_format(skip_out, channels_last), hidden_stats,
          skip_stats};
}

}  // namespace tiue
