// The fibers of host.h: who runs when.
#include "host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace tiue::host {

Slots slots;

namespace {

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

constexpr size_t kCopyBytes = 16;

struct Fiber {
  enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kReturned };
  State state;
  bool started;
  unsigned exchanges;
  ucontext_t context;
  jmp_buf jump;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // copies not yet landed, by committed group
};

struct Machine {
  std::mutex mutex;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  jmp_buf scheduler;
  int threads = 0, returned = 0, at_block_barrier = 0;
  int at_warp_barrier[kMaxThreads / 32];
  const Launch* launch = nullptr;
  std::string error;
};

Machine& machine() {
  static Machine* instance = new Machine;
  return *instance;
}

Fiber& self() { return machine().fibers[memory.current]; }

void to_scheduler() {
  memory.running = false;
  _longjmp(machine().scheduler, 1);
}

void park(Fiber::State state) {
  Fiber& fiber = self();
  fiber.state = state;
  if (_setjmp(fiber.jump) == 0) to_scheduler();
}

void release(int first, int last, Fiber::State from) {
  for (int i = first; i < last; ++i) {
    if (machine().fibers[i].state == from) machine().fibers[i].state = Fiber::kReady;
  }
}

void fiber_main() {
  const Launch& launch = *machine().launch;
  launch.body(launch.kernel, launch.params);
  ++machine().returned;
  park(Fiber::kReturned);
}

void resume(int index) {
  Machine& m = machine();
  if (_setjmp(m.scheduler)) return;
  memory.current = index;
  threadIdx.x = static_cast<unsigned>(index);
  Fiber& fiber = m.fibers[index];
  memory.running = true;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

void start_block(int threads) {
  Machine& m = machine();
  std::fill(std::begin(m.at_warp_barrier), std::end(m.at_warp_barrier), 0);
  m.threads = threads;
  m.returned = m.at_block_barrier = 0;
  begin_block(blockIdx.x);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.state = Fiber::kReady;
    fiber.started = false;
    fiber.exchanges = 0;
    fiber.copies.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = memory.stacks + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

template <typename T>
void shuffle(std::vector<T>& entries) {
  if (!is_seeded()) return;
  for (size_t i = entries.size(); i > 1; --i) {
    std::swap(entries[i - 1], entries[random_below(static_cast<int>(i))]);
  }
}

// Lets the lanes of a warp run that can, each until it waits; whether there were any.
bool run_lanes(int warp) {
  Machine& m = machine();
  std::vector<int> lanes(32);
  std::iota(lanes.begin(), lanes.end(), warp * 32);
  shuffle(lanes);
  bool ran = false;
  for (int lane : lanes) {
    if (m.fibers[lane].state != Fiber::kReady || !m.error.empty()) continue;
    resume(lane);
    ran = true;
  }
  return ran;
}

// Each warp goes as far as it can before the next one runs; with a seed it may stop at any barrier.
void run_block(int threads) {
  Machine& m = machine();
  start_block(threads);
  std::vector<int> warps(threads / 32);
  std::iota(warps.begin(), warps.end(), 0);
  for (bool progress = true; progress && m.returned < threads && m.error.empty();) {
    progress = false;
    shuffle(warps);
    for (int warp : warps) {
      while (run_lanes(warp)) {
        progress = true;
        if (is_seeded() && random_below(2)) break;
      }
    }
  }
  if (!m.error.empty()) throw std::runtime_error(m.error);
  if (m.returned < threads) {
    int at_warp = 0;
    for (size_t w = 0; w < warps.size(); ++w) at_warp += m.at_warp_barrier[w];
    throw std::runtime_error("divergent barrier in block " + std::to_string(blockIdx.x) + ": " +
                             std::to_string(m.at_block_barrier) +
                             " threads wait for their block, " + std::to_string(at_warp) +
                             " for their warp, " + std::to_string(m.returned) + " returned");
  }
}

}  // namespace

void leave_fiber(const std::string& error) {
  if (!memory.running) throw std::runtime_error(error);
  machine().error = error;
  to_scheduler();
  std::abort();
}

void block_barrier() {
  Machine& m = machine();
  if (++m.at_block_barrier < m.threads) return park(Fiber::kAtBlockBarrier);
  m.at_block_barrier = 0;
  at_block_barrier();
  release(0, m.threads, Fiber::kAtBlockBarrier);
}

void warp_barrier(bool orders) {
  Machine& m = machine();
  int warp = memory.current / 32;
  if (++m.at_warp_barrier[warp] < 32) return park(Fiber::kAtWarpBarrier);
  m.at_warp_barrier[warp] = 0;
  if (orders) at_warp_barrier(warp);
  release(warp * 32, warp * 32 + 32, Fiber::kAtWarpBarrier);
}

int next_buffer() { return static_cast<int>(self().exchanges++ % 2); }

void start_copy(void* to, const void* from, bool valid) {
  check_alignment(to, kCopyBytes, "an asynchronous copy");
  if (valid) check_alignment(from, kCopyBytes, "an asynchronous copy");
  begin_copy(to, from, kCopyBytes, valid);
  self().copies.push_back({to, from, valid});
}

void commit_copies() {
  Fiber& fiber = self();
  size_t grouped = std::accumulate(fiber.groups.begin(), fiber.groups.end(), size_t{0});
  fiber.groups.push_back(fiber.copies.size() - grouped);
}

void land_copies(size_t keep_groups) {
  Fiber& fiber = self();
  while (fiber.groups.size() > keep_groups) {
    auto end = fiber.copies.begin() + static_cast<std::ptrdiff_t>(fiber.groups.front());
    for (auto copy = fiber.copies.begin(); copy != end; ++copy) {
      land_copy(copy->to, kCopyBytes);
      if (copy->valid) {
        std::memcpy(copy->to, copy->from, kCopyBytes);
      } else {
        std::memset(copy->to, 0, kCopyBytes);
      }
    }
    fiber.copies.erase(fiber.copies.begin(), end);
    fiber.groups.erase(fiber.groups.begin());
  }
}

void run(const Launch& launch, int64_t blocks, int threads, size_t shared_bytes) {
  Machine& m = machine();
  std::lock_guard<std::mutex> lock(m.mutex);
  if (threads % 32 || threads > kMaxThreads || shared_bytes > kSharedBytes) {
    throw std::runtime_error("a launch of " + std::to_string(threads) + " threads with " +
                             std::to_string(shared_bytes) + " bytes of shared memory");
  }
  m.launch = &launch;
  m.error.clear();
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  seed_order();
  std::vector<unsigned> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0u);
  shuffle(order);
  begin_launch(launch.kernel, launch.params, launch.params_bytes, shared_bytes);
  for (unsigned block : order) {
    blockIdx.x = block;
    run_block(threads);
  }
}

}  // namespace tiue::host
