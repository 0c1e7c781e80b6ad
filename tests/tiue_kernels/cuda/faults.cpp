// Small kernels with one fault each, and one without: what the host execution says of them.
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>

#include "common/device.h"
#include "common/mma.h"

namespace {

constexpr int kThreads = 64, kBlocks = 3, kSharedBytes = 4096;

struct Params {
  const float* in;  // kThreads * kBlocks floats
  float* out;       // as many
};

__device__ float* tile() { return reinterpret_cast<float*>(tiue::shared_memory()); }
__device__ int at() { return static_cast<int>(threadIdx.x); }
__device__ float* own(Params p) { return p.out + blockIdx.x * kThreads + at(); }

void correct(Params p) {
  if (at() % 4 == 0) tiue::copy_async(tile() + at(), p.in + at(), true);
  tiue::commit_copies();
  tiue::wait_for_copies<0>();
  __syncthreads();
  float sum = tile()[(at() + 33) % kThreads];
  __syncthreads();
  tile()[at()] = sum;
  __syncwarp();
  *own(p) = tile()[at() ^ 1];
}

void missing_syncwarp(Params p) {
  tile()[at()] = p.in[at()];
  float other = __shfl_xor_sync(tiue::kFullWarp, tile()[at()], 1);  // orders no memory
  *own(p) = other + tile()[at() ^ 1];
}

void missing_syncthreads(Params p) {
  tile()[at()] = p.in[at()];
  __syncwarp();
  *own(p) = tile()[(at() + 32) % kThreads];
}

void missing_syncthreads_before_reuse(Params p) {
  tile()[at()] = p.in[at()];
  __syncthreads();
  *own(p) = tile()[(at() + 32) % kThreads];
  tile()[at()] = 0.0f;
}

void race_of_blocks(Params p) { p.out[at()] = p.in[at()]; }

void misaligned_load(Params p) { *own(p) = tiue::load_vector<4>(p.in + 1).data[0]; }

void misaligned_store(Params p) {
  if (at() == 0) tiue::store_vector(own(p) + 2, tiue::Vector<float, 4>{});
}

void copy_not_waited_for(Params p) {
  if (at() % 4 == 0) tiue::copy_async(tile() + at(), p.in + at(), true);
  tiue::commit_copies();
  __syncthreads();
  *own(p) = tile()[at()];
}

void copy_into_what_is_read(Params p) {
  tile()[at()] = p.in[at()];
  __syncthreads();
  *own(p) = tile()[kThreads - 1 - at()];
  if (at() % 4 == 0) tiue::copy_async(tile() + at(), p.in + at(), true);
  tiue::commit_copies();
  tiue::wait_for_copies<0>();
}

void shared_memory_that_nobody_wrote(Params p) { *own(p) = tile()[kThreads] * 0.0f; }

void read_outside(Params p) {
  float value = p.in[blockIdx.x * kThreads + at() + 1];  // the last thread of all
  *own(p) = at() < kThreads - 1 ? value : 0.0f;
}

void write_behind_shared_memory(Params) { tile()[kSharedBytes / 4 + at()] = 0.0f; }

void divergent_barrier(Params) {
  if (at() < kThreads - 1) __syncthreads();
}

const std::map<std::string, void (*)(Params)> kKernels = {
    {"correct", correct},
    {"missing_syncwarp", missing_syncwarp},
    {"missing_syncthreads", missing_syncthreads},
    {"missing_syncthreads_before_reuse", missing_syncthreads_before_reuse},
    {"race_of_blocks", race_of_blocks},
    {"misaligned_load", misaligned_load},
    {"misaligned_store", misaligned_store},
    {"copy_not_waited_for", copy_not_waited_for},
    {"copy_into_what_is_read", copy_into_what_is_read},
    {"shared_memory_that_nobody_wrote", shared_memory_that_nobody_wrote},
    {"read_outside", read_outside},
    {"write_behind_shared_memory", write_behind_shared_memory},
    {"divergent_barrier", divergent_barrier},
};

}  // namespace

int main() {
  alignas(16) static float in[kThreads * kBlocks], out[kThreads * kBlocks];
  for (const auto& [name, kernel] : kKernels) {
    std::string said = "nothing";
    try {
      tiue::host::forget_allowed();
      tiue::host::allow(in, sizeof(in));
      tiue::host::allow(out, sizeof(out));
      tiue::host::launch(kernel, kBlocks, kThreads, kSharedBytes, Params{in, out});
    } catch (const std::runtime_error& error) {
      said = error.what();
    }
    std::printf("%s: %s\n", name.c_str(), said.c_str());
  }
}
