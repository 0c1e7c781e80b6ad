#include "../ops.h"
#include "geometry.h"

namespace tiue {
namespace skip_norm {

namespace {

template <typename T>
struct BackwardParams {
  Geometry geometry;
  const T* grad_hidden_out;
  const T* grad_skip_out;
  const T* hidden;
  const T* skip;
  T* grad_hidden;
  T* grad_skip;
  FloatArray weight, bias;
  const float* hidden_stats;
  const float* skip_stats;
  float* partial_weight;  // [pixel chunks * rows, C]: the sums over the pixels of a row
  float* partial_bias;
};

// Loads in flight a thread: two maps are loaded, and 4 spill at 8 elements a load.
constexpr int kBatch = 2;

enum class Pass { kWhole, kSums, kApply };

struct GroupTerms {
  float mean, rstd;
  float bias_term, weight_term;  // means over the group of w dz and of w dz xhat
};

template <typename T>
__device__ __forceinline__ void load_stats(const BackwardParams<T>& params, bool in_skip, int row,
                                           int group, GroupTerms* terms) {
  const Geometry& g = params.geometry;
  int groups = in_skip ? g.groups - g.hidden_groups : g.hidden_groups;
  const float* stats = in_skip ? params.skip_stats : params.hidden_stats;
  int64_t at = static_cast<int64_t>(row) * groups + group - (in_skip ? g.hidden_groups : 0);
  terms->mean = stats[at];
  terms->rstd = stats[at + static_cast<int64_t>(in_skip ? g.batch : g.rows) * groups];
}

template <bool kChannelsLast>
__device__ __forceinline__ int64_t partial_row(const Geometry& g, bool in_skip, int row,
                                               int chunk) {
  return (kChannelsLast ? static_cast<int64_t>(chunk) * (in_skip ? g.batch : g.rows) : 0) + row;
}

// One warp: the two means of a group, from the sums over its channels that lie in global memory.
template <bool kChannelsLast, typename T>
__device__ __forceinline__ void sum_group(const BackwardParams<T>& params, bool in_skip, int row,
                                          int group, GroupTerms* terms) {
  const Geometry& g = params.geometry;
  int lane = static_cast<int>(threadIdx.x) % 32;
  float weight_term = 0.0f, bias_term = 0.0f;
  for (int chunk = 0; chunk < (kChannelsLast ? g.chunks : 1); ++chunk) {
    int64_t begin = partial_row<kChannelsLast>(g, in_skip, row, chunk) * g.channels;
    for (int i = lane; i < g.group_size; i += 32) {
      int channel = group * g.group_size + i;
      float w = params.weight[channel];
      weight_term += w * params.partial_weight[begin + channel];
      bias_term += w * params.partial_bias[begin + channel];
    }
  }
  weight_term = warp_sum(weight_term);
  bias_term = warp_sum(bias_term);
  if (lane == 0) {
    float share = 1.0f / (static_cast<float>(g.group_size) * g.pixels);
    terms->weight_term = weight_term * share;
    terms->bias_term = bias_term * share;
  }
}

// dL/dz for y = SiLU(z).
template <typename T>
__device__ __forceinline__ float silu_grad(float z, float grad) {
  float s = sigmoid<T>(z);
  return grad * s * (1.0f + z * (1.0f - s));
}

template <typename T, int kVector>
struct Pair {
  Vector<T, kVector> x, grad;
};

// One block works on one chunk of an item. z = w xhat + b and dz = dL/dz are recomputed; the sums
// of dz and dz xhat over the pixels of a channel are the row's share of the gradients of b and w,
// and their weighted means over a group, m and n, give dx = rstd (w dz - m - n xhat). kWhole holds
// input and gradient in shared memory in between; the other two passes read them twice. Skip
// channels of a straddling group are left to straddle_kernel.
template <typename T, int kVector, bool kChannelsLast, Pass kPass>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_kernel(BackwardParams<T> params) {
  const Geometry& g = params.geometry;
  int64_t item = blockIdx.x / g.chunks;
  int chunk = static_cast<int>(blockIdx.x % g.chunks);
  Range range = find_range<kChannelsLast>(g, item, chunk);
  int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  int channels = range.channel_end - range.channel;
  int groups = range.group_end - range.group;
  int per_pixel = channels / kVector;

  // Contiguous: the two sums of each channel; channels_last: of each thread and vector element.
  float* weight_sums = reinterpret_cast<float*>(shared_memory());
  float* bias_sums =
      weight_sums + (kChannelsLast ? kMaxThreads * kVector : (g.group_size + 3) / 4 * 4);
  GroupTerms* terms = reinterpret_cast<GroupTerms*>(bias_sums + (bias_sums - weight_sums));
  auto* held = reinterpret_cast<Pair<T, kVector>*>(terms + g.bundle);

  if (thread < groups) {
    load_stats(params, range.in_skip, range.row, range.group + thread, &terms[thread]);
  }
  __syncthreads();

  constexpr int kCoefficients = kChannelsLast ? kVector : 1;
  float mean[kCoefficients], rstd[kCoefficients], w[kCoefficients], b[kCoefficients];
  float weight_sum[kCoefficients], bias_sum[kCoefficients];
  auto begin = [&](int channel) {
#pragma unroll
    for (int i = 0; i < kCoefficients; ++i) {
      const GroupTerms& group = terms[(channel + i) / g.group_size - range.group];
      mean[i] = group.mean;
      rstd[i] = group.rstd;
      w[i] = params.weight[channel + i];
      b[i] = params.bias[channel + i];
      weight_sum[i] = bias_sum[i] = 0.0f;
    }
  };
  auto load_input = [&](int channel, int pixel, int) {
    return Pair<T, kVector>{
        load_vector<kVector>(
            locate_input<kChannelsLast>(g, range, params.hidden, params.skip, channel, pixel)),
        load_vector<kVector>(locate_output<kChannelsLast>(g, range, params.grad_hidden_out,
                                                          params.grad_skip_out, channel, pixel))};
  };

  if constexpr (kPass != Pass::kApply) {
    walk<kChannelsLast, kVector, kBatch>(
        range, begin, load_input,
        [&](int, int, int slot, const Pair<T, kVector>& pair) {
          if constexpr (kPass == Pass::kWhole) held[slot] = pair;
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            int c = kChannelsLast ? i : 0;
            float xhat = (to_float(pair.x.data[i]) - mean[c]) * rstd[c];
            float dz = silu_grad<T>(fmaf(xhat, w[c], b[c]), to_float(pair.grad.data[i]));
            weight_sum[c] += dz * xhat;
            bias_sum[c] += dz;
          }
        },
        [&](int channel) {
          if constexpr (kChannelsLast) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              weight_sums[thread * kVector + i] = weight_sum[i];
              bias_sums[thread * kVector + i] = bias_sum[i];
            }
          } else {
            weight_sum[0] = warp_sum(weight_sum[0]);
            bias_sum[0] = warp_sum(bias_sum[0]);
            if (thread % 32 == 0) {
              weight_sums[channel - range.channel] = weight_sum[0];
              bias_sums[channel - range.channel] = bias_sum[0];
            }
          }
        });
    __syncthreads();
    int64_t out = partial_row<kChannelsLast>(g, range.in_skip, range.row, chunk) * g.channels;
    for (int i = thread; i < channels; i += threads) {
      float weight_total = 0.0f, bias_total = 0.0f;
      for (int lane = 0; lane < (kChannelsLast ? threads / per_pixel : 1); ++lane) {
        weight_total += weight_sums[lane * channels + i];
        bias_total += bias_sums[lane * channels + i];
      }
      params.partial_weight[out + range.channel + i] = weight_total;
      params.partial_bias[out + range.channel + i] = bias_total;
    }
    if constexpr (kPass == Pass::kSums) return;
    __syncthreads();
  }

  for (int group = thread / 32; group < groups; group += threads / 32) {
    sum_group<kChannelsLast>(params, range.in_skip, range.row, range.group + group, &terms[group]);
  }
  __syncthreads();

  float weight_term[kCoefficients], bias_term[kCoefficients];
  walk<kChannelsLast, kVector, kBatch>(
      range,
      [&](int channel) {
        begin(channel);
#pragma unroll
        for (int i = 0; i < kCoefficients; ++i) {
          const GroupTerms& group = terms[(channel + i) / g.group_size - range.group];
          weight_term[i] = group.weight_term;
          bias_term[i] = group.bias_term;
        }
      },
      [&](int channel, int pixel, int slot) {
        if constexpr (kPass == Pass::kWhole) return held[slot];
        return load_input(channel, pixel, slot);
      },
      [&](int channel, int pixel, int, const Pair<T, kVector>& pair) {
        bool from_hidden = channel < g.hidden_channels;
        if (!from_hidden && !range.in_skip) return;
        Vector<T, kVector> out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          int c = kChannelsLast ? i : 0;
          float xhat = (to_float(pair.x.data[i]) - mean[c]) * rstd[c];
          float dz = silu_grad<T>(fmaf(xhat, w[c], b[c]), to_float(pair.grad.data[i]));
          out.data[i] = from_float<T>(rstd[c] * (dz * w[c] - bias_term[c] - xhat * weight_term[c]));
        }
        store_vector(locate_input<kChannelsLast>(g, range, params.grad_hidden, params.grad_skip,
                                                 channel, pixel),
                     out);
      },
      [](int) {});
}

template <typename T>
struct StraddleParams {
  BackwardParams<T> backward;
  int timesteps;
  int chunks, chunk_size;
};

// The skip channels of the straddling group: one block sums a chunk of one sample's gradient over
// the K timesteps. The input is read once; only the gradient of the output differs between them.
template <typename T, int kVector, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, 1) straddle_kernel(StraddleParams<T> straddle) {
  const BackwardParams<T>& params = straddle.backward;
  const Geometry& g = params.geometry;
  int timesteps = straddle.timesteps, chunk_size = straddle.chunk_size;
  int chunk = static_cast<int>(blockIdx.x) % straddle.chunks;
  int group = g.hidden_groups - 1;
  Range range{static_cast<int>(blockIdx.x) / straddle.chunks,
              false,
              group,
              group + 1,
              g.hidden_channels,
              g.border,
              0,
              g.pixels};
  if (kChannelsLast) {
    range.pixel = chunk * chunk_size;
    range.pixel_end = min(range.pixel + chunk_size, g.pixels);
  } else {
    range.channel += chunk * chunk_size;
    range.channel_end = min(range.channel + chunk_size, range.channel_end);
  }
  GroupTerms* terms = reinterpret_cast<GroupTerms*>(shared_memory());
  int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  for (int k = thread / 32; k < timesteps; k += warps) {
    int row = k * g.batch + range.row;
    if (thread % 32 == 0) load_stats(params, false, row, group, &terms[k]);
    sum_group<kChannelsLast>(params, false, row, group, &terms[k]);
  }
  __syncthreads();

  constexpr int kCoefficients = kChannelsLast ? kVector : 1;
  float w[kCoefficients], b[kCoefficients];
  walk<kChannelsLast, kVector, kBatch>(
      range,
      [&](int channel) {
#pragma unroll
        for (int i = 0; i < kCoefficients; ++i) {
          w[i] = params.weight[channel + i];
          b[i] = params.bias[channel + i];
        }
      },
      [&](int channel, int pixel, int) {
        return load_vector<kVector>(
            locate_input<kChannelsLast>(g, range, params.hidden, params.skip, channel, pixel));
      },
      [&](int channel, int pixel, int, const Vector<T, kVector>& x) {
        float sum[kVector] = {};
        for (int k = 0; k < timesteps; ++k) {
          GroupTerms of = terms[k];
          auto grad = load_vector<kVector>(
              params.grad_hidden_out +
              offset<kChannelsLast>(g, k * g.batch + range.row, g.border, channel, pixel));
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            int c = kChannelsLast ? i : 0;
            float xhat = (to_float(x.data[i]) - of.mean) * of.rstd;
            float dz = silu_grad<T>(fmaf(xhat, w[c], b[c]), to_float(grad.data[i]));
            sum[i] += of.rstd * (dz * w[c] - of.bias_term - xhat * of.weight_term);
          }
        }
        Vector<T, kVector> out;
#pragma unroll
        for (int i = 0; i < kVector; ++i) out.data[i] = from_float<T>(sum[i]);
        store_vector(locate_input<kChannelsLast>(g, range, params.grad_hidden, params.grad_skip,
                                                 channel, pixel),
                     out);
      },
      [](int) {});
}

size_t backward_scratch_bytes(const Plan& plan) {
  size_t sums = plan.channels_last ? static_cast<size_t>(kMaxThreads) * plan.vector
                                   : (plan.geometry.group_size + 3) / 4 * 4;
  return 2 * sums * sizeof(float) + plan.geometry.bundle * sizeof(GroupTerms);
}

template <typename T, int kVector, bool kLast>
void launch_backward(const Device& device, const Plan& plan, const BackwardParams<T>& params) {
  const Geometry& g = plan.geometry;
  size_t scratch = backward_scratch_bytes(plan);
  int64_t blocks = plan.items() * g.chunks;
  if (plan.resident) {
    size_t held = plan.bundle_channels * g.pixels * sizeof(T) * 2;
    device.launch(backward_kernel<T, kVector, kLast, Pass::kWhole>, blocks, plan.threads,
                  scratch + held, params);
  } else {
    device.launch(backward_kernel<T, kVector, kLast, Pass::kSums>, blocks, plan.threads, scratch,
                  params);
    device.launch(backward_kernel<T, kVector, kLast, Pass::kApply>, blocks, plan.threads, scratch,
                  params);
  }
  int straddling = g.border - g.hidden_channels;
  if (!straddling || !g.batch) return;
  StraddleParams<T> straddle{params, g.rows / g.batch};
  int whole = kLast ? g.pixels : straddling;
  int chunk = kLast ? std::max(1, 16 * kMaxThreads * kVector / straddling) : kMaxWarps;
  straddle.chunks = ceil_div(whole, chunk);
  straddle.chunk_size = ceil_div(whole, straddle.chunks);
  int64_t straddle_blocks = static_cast<int64_t>(g.batch) * straddle.chunks;
  device.launch(straddle_kernel<T, kVector, kLast>, straddle_blocks,
                kLast ? kMaxThreads : 32 * std::min(straddle.chunk_size, kMaxWarps),
                straddle.timesteps * sizeof(GroupTerms), straddle);
}

}  // namespace
}  // namespace skip_norm

Tensors4 shared_skip_group_norm_silu_bwd(Tensor grad_hidden_out, Tensor grad_skip_out,
                                         Tensor hidden, Tensor skip, int64_t num_groups,
                                         Tensor weight, Tensor bias, Tensor hidden_stats,
                                         Tensor skip_stats) {
  using namespace skip_norm;
  Device device(hidden);
  Geometry geometry = make_geometry(hidden, skip, num_groups);
  bool channels_last = is_channels_last(hidden);
  Plan plan = arrange(geometry, {&hidden, &skip, &grad_hidden_out, &grad_skip_out}, 2,
                      device.shared_bytes(), backward_scratch_bytes);
  const Geometry& g = plan.geometry;
  Tensor grad_hidden = new_map(hidden, g.rows, g.hidden_channels, plan.channels_last);
  Tensor grad_skip = new_map(hidden, g.batch, skip.size(1), plan.channels_last);
  Tensor grad_weight = torch::stable::new_empty(weight, {g.channels}, weight.scalar_type());
  Tensor grad_bias = torch::stable::new_empty(bias, {g.channels}, bias.scalar_type());
  int pixel_chunks = plan.channels_last ? g.chunks : 1;
  Tensor partial = new_float(hidden, {2, pixel_chunks * g.rows, g.channels});
  float* partial_weight = data<float>(partial);
  float* partial_bias = partial_weight + partial.numel() / 2;
  // Held across the launch, which reads them through bare pointers.
  Tensor hidden_statistics = torch::stable::contiguous(hidden_stats);
  Tensor skip_statistics = torch::stable::contiguous(skip_stats);
  dispatch_plan(hidden, plan, [&](auto zero, auto vector, auto last) {
    using T = decltype(zero);
    BackwardParams<T> params{g,
                             data<T>(grad_hidden_out),
                             data<T>(grad_skip_out),
                             data<T>(hidden),
                             data<T>(skip),
                             data<T>(grad_hidden),
                             data<T>(grad_skip),
                             float_array(weight),
                             float_array(bias),
                             data<float>(hidden_statistics),
                             data<float>(skip_statistics),
                             partial_weight,
                             partial_bias};
    launch_backward<T, decltype(vector)::value, decltype(last)::value>(device, plan, params);
  });
  int hidden_rows = pixel_chunks * g.rows, skip_rows = pixel_chunks * g.batch;
  sum_rows(device, partial_weight, grad_weight, hidden_rows, g.border, skip_rows);
  sum_rows(device, partial_bias, grad_bias, hidden_rows, g.border, skip_rows);
  return {in_format(grad_hidden, channels_last), in_format(grad_skip, channels_last), grad_weight,
          grad_bias};
}

}  // namespace tiue
