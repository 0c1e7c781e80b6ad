#include "host_memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "host.h"

namespace tiue::host {

namespace {

constexpr uintptr_t kPageBytes = 4096, kCellBytes = 2;

// Who and when. The launch's block is part of who: blocks are never ordered.
struct Stamp {
  uint32_t block = 0, time = 0;
  int thread = -1;
};

// Of the readers three are enough to find one that a write is not ordered with: the last, the last
// of another thread of its warp, the last of another warp; and the last of another block.
struct Cell {
  Stamp write, read, read_by_lane, read_by_warp, read_by_block;
  int copied_by = -1;  // the thread whose asynchronous copy has not landed
};

bool is_ready = false;  // statics of other files run instrumented code before these are there

struct State {
  std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
  uintptr_t last_page = 0;
  Cell* last_cells = nullptr;
  std::vector<std::pair<uintptr_t, uintptr_t>> allowed;
  std::mt19937 random;
  bool seeded = false, inside = false;
};

State& state() {
  static State* instance = new State;
  return *instance;
}

Cell& cell_of(uintptr_t address) {
  State& s = state();
  uintptr_t page = address / kPageBytes;
  if (page != s.last_page) {
    auto& cells = s.pages[page];
    if (!cells) cells = std::make_unique<Cell[]>(kPageBytes / kCellBytes);
    s.last_page = page;
    s.last_cells = cells.get();
  }
  return s.last_cells[address % kPageBytes / kCellBytes];
}

uintptr_t number(const void* address) { return reinterpret_cast<uintptr_t>(address); }

bool in_shared(uintptr_t address) {
  return address >= number(memory.shared) &&
         address < number(memory.shared) + sizeof(memory.shared);
}

// What a thread has of the host's: the launch, threadIdx and its like, the slots of a shuffle.
bool is_of_the_machine(uintptr_t address) {
  auto within = [&](const auto& object) {
    return address >= number(&object) && address < number(&object) + sizeof(object);
  };
  return address == memory.kernel || (address >= memory.params && address < memory.params_end) ||
         within(threadIdx) || within(blockIdx) || within(blockDim) || within(gridDim) ||
         within(slots) || (within(memory) && !in_shared(address));
}

std::string place_of(uintptr_t address) {
  if (in_shared(address)) {
    return "shared byte " + std::to_string(address - number(memory.shared));
  }
  for (size_t i = 0; i < state().allowed.size(); ++i) {
    auto [begin, end] = state().allowed[i];
    if (address >= begin && address < end) {
      return "byte " + std::to_string(address - begin) + " of tensor " + std::to_string(i);
    }
  }
  return "memory of no tensor";
}

// Whether an access of the past came to an end before the present one of this thread.
bool is_ordered(const Stamp& past) {
  if (past.thread < 0 || past.time < memory.launch_began) return true;
  if (past.block != memory.block) return false;
  if (past.thread == memory.current || past.time < memory.block_barrier) return true;
  int warp = memory.current / 32;
  return past.thread / 32 == warp && past.time < memory.warp_barrier[warp];
}

void require_order(const Stamp& past, uintptr_t address, const char* did, const char* does) {
  if (is_ordered(past)) return;
  fail(std::string("a race: it ") + does + " " + place_of(address) + ", which thread " +
       std::to_string(past.thread) + " of block " + std::to_string(past.block) + " " + did +
       " with no barrier between them");
}

void note(uintptr_t address, Access kind) {
  Cell& cell = cell_of(address);
  Stamp me{memory.block, memory.now, memory.current};
  if (cell.copied_by >= 0) {
    fail("it touches " + place_of(address) + " before thread " + std::to_string(cell.copied_by) +
         " has waited for its asynchronous copy there");
  }
  if (kind == Access::kWrite) {
    require_order(cell.write, address, "wrote", "writes");
    for (const Stamp* read :
         {&cell.read, &cell.read_by_lane, &cell.read_by_warp, &cell.read_by_block}) {
      require_order(*read, address, "read", "writes");
    }
    cell.write = me;
    return;
  }
  require_order(cell.write, address, "wrote", "reads");
  if (in_shared(address) && cell.write.time < memory.block_began) {
    fail("it reads " + place_of(address) + ", which nobody wrote");
  }
  const Stamp& last = cell.read;
  if (last.block != me.block) {
    cell.read_by_block = last;
  } else if (last.thread / 32 != me.thread / 32) {
    cell.read_by_warp = last;
  } else if (last.thread != me.thread) {
    cell.read_by_lane = last;
  }
  cell.read = me;
}

void require_allowed(uintptr_t address, size_t bytes, Access kind) {
  const char* does = kind == Access::kRead ? "reads" : "writes";
  if (in_shared(address)) {
    if (address + bytes <= number(memory.shared) + memory.shared_bytes) return;
    fail(std::string("it ") + does + " behind its " + std::to_string(memory.shared_bytes) +
         " bytes of shared memory");
  }
  for (auto [begin, end] : state().allowed) {
    if (address >= begin && address + bytes <= end) return;
  }
  fail(std::string("it ") + does + " " + std::to_string(bytes) + " bytes outside of every tensor");
}

}  // namespace

Memory& memory = *[] {
  auto* made = new Memory;
  void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) std::abort();
  made->stacks = static_cast<char*>(stacks);
  is_ready = true;
  return made;
}();

void allow(const void* begin, size_t bytes) {
  state().allowed.emplace_back(number(begin), number(begin) + bytes);
}

void forget_allowed() { state().allowed.clear(); }

void begin_launch(const void* kernel, const void* params, size_t params_bytes,
                  size_t shared_bytes) {
  memory.kernel = number(kernel);
  memory.params = number(params);
  memory.params_end = memory.params + params_bytes;
  memory.shared_bytes = shared_bytes;
  memory.launch_began = ++memory.now;
}

void begin_block(uint32_t block) {
  memory.block = block;
  memory.block_began = memory.block_barrier = ++memory.now;
  for (uint32_t& time : memory.warp_barrier) time = memory.now;
  std::memset(memory.shared, kPoison, sizeof(memory.shared));
  // Blocks take turns on one array: what one did there is nothing to the next.
  uintptr_t begin = number(memory.shared), end = begin + memory.shared_bytes;
  for (uintptr_t address = begin; address < end; address += kCellBytes) cell_of(address) = Cell{};
}

void at_block_barrier() { memory.block_barrier = ++memory.now; }

void at_warp_barrier(int warp) { memory.warp_barrier[warp] = ++memory.now; }

void access(const void* pointer, size_t bytes, Access kind) {
  if (!is_ready || !memory.running || state().inside) return;
  uintptr_t address = number(pointer);
  if (address - number(memory.stacks) < kMaxThreads * kStackBytes) return;
  if (is_of_the_machine(address)) return;
  state().inside = true;
  require_allowed(address, bytes, kind);
  for (uintptr_t at = address / kCellBytes * kCellBytes; at < address + bytes; at += kCellBytes) {
    note(at, kind);
  }
  state().inside = false;
}

void begin_copy(const void* to, const void* from, size_t bytes, bool reads) {
  if (reads) access(from, bytes, Access::kRead);
  access(to, bytes, Access::kWrite);
  for (size_t i = 0; i < bytes; i += kCellBytes) {
    cell_of(number(to) + i).copied_by = memory.current;
  }
}

void land_copy(const void* to, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kCellBytes) cell_of(number(to) + i).copied_by = -1;
  access(to, bytes, Access::kWrite);
}

void check_alignment(const void* address, size_t bytes, const char* what) {
  if (number(address) % bytes == 0) return;
  fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at an address that is no " +
       "multiple of them: " + place_of(number(address)));
}

void fail(const std::string& message) {
  state().inside = false;
  leave_fiber("thread " + std::to_string(memory.current) + " of block " +
              std::to_string(memory.block) + ": " + message);
}

void seed_order() {
  const char* seed = std::getenv("TIUE_HOST_SEED");
  state().seeded = seed && std::string(seed) != "0";
  if (state().seeded) state().random.seed(static_cast<unsigned>(std::strtoul(seed, nullptr, 10)));
}

bool is_seeded() { return state().seeded; }

int random_below(int n) { return static_cast<int>(state().random() % static_cast<unsigned>(n)); }

}  // namespace tiue::host

// What the compiler calls, for accesses of each size.
#define TIUE_HOOKS(SIZE)                                                                          \
  void __tsan_read##SIZE(void* at) { tiue::host::access(at, SIZE, tiue::host::Access::kRead); }   \
  void __tsan_write##SIZE(void* at) { tiue::host::access(at, SIZE, tiue::host::Access::kWrite); } \
  void __tsan_volatile_read##SIZE(void* at) { __tsan_read##SIZE(at); }                            \
  void __tsan_volatile_write##SIZE(void* at) { __tsan_write##SIZE(at); }

extern "C" {
TIUE_HOOKS(1)
TIUE_HOOKS(2)
TIUE_HOOKS(4)
TIUE_HOOKS(8)
TIUE_HOOKS(16)
void __tsan_read_range(void* at, size_t bytes) {
  tiue::host::access(at, bytes, tiue::host::Access::kRead);
}
void __tsan_write_range(void* at, size_t bytes) {
  tiue::host::access(at, bytes, tiue::host::Access::kWrite);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
// Of reference counts and of guards of statics, on the host side of an operator.
char __tsan_atomic8_load(const volatile char* at, int) { return __atomic_load_n(at, 5); }
int __tsan_atomic32_load(const volatile int* at, int) { return __atomic_load_n(at, 5); }
long __tsan_atomic64_load(const volatile long* at, int) { return __atomic_load_n(at, 5); }
void __tsan_atomic8_store(volatile char* at, char value, int) { __atomic_store_n(at, value, 5); }
void __tsan_atomic32_store(volatile int* at, int value, int) { __atomic_store_n(at, value, 5); }
int __tsan_atomic32_fetch_add(volatile int* at, int value, int) {
  return __atomic_fetch_add(at, value, 5);
}
long __tsan_atomic64_fetch_add(volatile long* at, long value, int) {
  return __atomic_fetch_add(at, value, 5);
}
int __tsan_atomic32_fetch_sub(volatile int* at, int value, int) {
  return __atomic_fetch_sub(at, value, 5);
}
}
