// Runs kernels on the CPU, for tests on machines without a GPU: one fiber a thread.
//
// A block's threads take turns on one CPU thread. `__syncthreads`, shuffles and the matrix
// instructions park a fiber until its block or warp has arrived. Shared memory is NaN when a block
// starts, so that reading what nobody wrote shows in the result; asynchronous copies land when they
// are waited for, never sooner. A barrier that some threads never reach is an error, as is a
// write behind the shared memory that the launch asked for.
#pragma once

#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace tiue::host {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 227 * 1024;  // of sm_90
constexpr size_t kGuardBytes = 1024;
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point type
constexpr int kSlotBytes = 64;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool zero;
};

struct Fiber {
  enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kReturned };
  State state;
  bool started;
  unsigned exchanges;
  ucontext_t context;
  jmp_buf jump;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // copies not yet landed, by committed group
};

struct Machine {
  std::mutex mutex;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  jmp_buf scheduler;
  int current = 0, threads = 0, returned = 0, at_block_barrier = 0;
  int at_warp_barrier[kMaxThreads / 32];
  alignas(16) unsigned char slots[kMaxThreads / 32][2][32][kSlotBytes];
  alignas(128) unsigned char shared[kSharedBytes + kGuardBytes];
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

inline Machine& machine() {
  static Machine* instance = new Machine;
  return *instance;
}

inline Fiber& self() { return machine().fibers[machine().current]; }

inline void park(Fiber::State state) {
  Fiber& fiber = self();
  fiber.state = state;
  if (_setjmp(fiber.jump) == 0) _longjmp(machine().scheduler, 1);
}

inline void release(int first, int last, Fiber::State from) {
  for (int i = first; i < last; ++i) {
    if (machine().fibers[i].state == from) machine().fibers[i].state = Fiber::kReady;
  }
}

inline void block_barrier() {
  Machine& m = machine();
  if (++m.at_block_barrier < m.threads) return park(Fiber::kAtBlockBarrier);
  m.at_block_barrier = 0;
  release(0, m.threads, Fiber::kAtBlockBarrier);
}

inline void warp_barrier() {
  Machine& m = machine();
  int warp = m.current / 32;
  if (++m.at_warp_barrier[warp] < 32) return park(Fiber::kAtWarpBarrier);
  m.at_warp_barrier[warp] = 0;
  release(warp * 32, warp * 32 + 32, Fiber::kAtWarpBarrier);
}

// What every lane of the warp handed in. Two buffers take turns: a lane can write the next one
// while others still read this one, and nobody gets further ahead than that.
template <typename T>
struct Lanes {
  const unsigned char (*slots)[kSlotBytes];
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof(T));
    return value;
  }
};

template <typename T>
Lanes<T> exchange(const T& value) {
  static_assert(sizeof(T) <= kSlotBytes);
  auto& buffer = machine().slots[machine().current / 32][self().exchanges++ % 2];
  std::memcpy(buffer[machine().current % 32], &value, sizeof(T));
  warp_barrier();
  return {buffer};
}

inline void land_copies(size_t keep_groups) {
  Fiber& fiber = self();
  while (fiber.groups.size() > keep_groups) {
    for (size_t i = 0; i < fiber.groups.front(); ++i) {
      const Copy& copy = fiber.copies[i];
      if (copy.zero) {
        std::memset(copy.to, 0, copy.bytes);
      } else {
        std::memcpy(copy.to, copy.from, copy.bytes);
      }
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + fiber.groups.front());
    fiber.groups.erase(fiber.groups.begin());
  }
}

inline void fiber_main() {
  machine().body(machine().argument);
  ++machine().returned;
  park(Fiber::kReturned);
}

inline void resume(int index) {
  Machine& m = machine();
  if (_setjmp(m.scheduler)) return;
  m.current = index;
  threadIdx.x = static_cast<unsigned>(index);
  Fiber& fiber = m.fibers[index];
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void start_block(int threads) {
  Machine& m = machine();
  std::memset(m.shared, kPoison, sizeof(m.shared));
  std::memset(m.at_warp_barrier, 0, sizeof(m.at_warp_barrier));
  m.threads = threads;
  m.returned = m.at_block_barrier = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.state = Fiber::kReady;
    fiber.started = false;
    fiber.exchanges = 0;
    fiber.copies.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

// Each warp goes as far as it can before the next one runs, the last warp first when `reversed`:
// what a missing barrier leaves to chance differs between the two orders.
inline void run_block(int threads, size_t shared_bytes, bool reversed) {
  Machine& m = machine();
  start_block(threads);
  int warps = threads / 32;
  for (bool progress = true; progress && m.returned < threads;) {
    progress = false;
    for (int w = 0; w < warps; ++w) {
      int first = (reversed ? warps - 1 - w : w) * 32;
      for (bool ran = true; ran;) {
        ran = false;
        for (int i = first; i < first + 32; ++i) {
          if (m.fibers[i].state != Fiber::kReady) continue;
          resume(i);
          progress = ran = true;
        }
      }
    }
  }
  if (m.returned < threads) {
    int at_warp = 0;
    for (int w = 0; w < warps; ++w) at_warp += m.at_warp_barrier[w];
    throw std::runtime_error("divergent barrier in block " + std::to_string(blockIdx.x) + ": " +
                             std::to_string(m.at_block_barrier) +
                             " threads wait for their block, " + std::to_string(at_warp) +
                             " for their warp, " + std::to_string(m.returned) + " returned");
  }
  for (size_t i = shared_bytes; i < shared_bytes + kGuardBytes && i < sizeof(m.shared); ++i) {
    if (m.shared[i] != kPoison) {
      throw std::runtime_error("a block wrote behind its " + std::to_string(shared_bytes) +
                               " bytes of shared memory");
    }
  }
}

template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes,
            const Params& params) {
  std::lock_guard<std::mutex> lock(machine().mutex);
  if (threads % 32 || threads > kMaxThreads || shared_bytes > kSharedBytes) {
    throw std::runtime_error("a launch of " + std::to_string(threads) + " threads with " +
                             std::to_string(shared_bytes) + " bytes of shared memory");
  }
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call{kernel, &params};
  machine().body = [](void* pointer) {
    auto* call = static_cast<Call*>(pointer);
    call->kernel(*call->params);
  };
  machine().argument = &call;
  const char* order = std::getenv("TIUE_HOST_ORDER");
  bool reversed = order && std::string(order) == "reversed";
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(reversed ? blocks - 1 - i : i);
    run_block(threads, shared_bytes, reversed);
  }
}

}  // namespace tiue::host

inline void __syncthreads() { tiue::host::block_barrier(); }
inline void __syncwarp() { tiue::host::warp_barrier(); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return tiue::host::exchange(value)[lane % 32];
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  int lane = static_cast<int>(threadIdx.x) % 32;
  return tiue::host::exchange(value)[lane ^ mask];
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
