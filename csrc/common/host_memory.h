// Every byte that a kernel on the CPU reads and writes, checked as it happens.
//
// Kernels are compiled with the compiler's instrumentation for thread sanitizers, so that each
// access calls `access`; what it is checked for is here and in host_memory.cpp, no sanitizer's
// library is linked. Beside every two bytes of shared and global memory (no element is smaller) lie
// who wrote and read them last, and when. Time advances at barriers: two accesses of different
// threads, one of them a write, are ordered by a barrier of their block, or of their warp, or by
// the end of the launch, or else they are a race, in whatever order they ran this time. A shuffle
// is no barrier, as on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tiue::host {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 227 * 1024;  // of sm_90
constexpr unsigned char kPoison = 0xff;      // a NaN in every floating-point type

// Memory that is checked, and where the threads are.
struct Memory {
  bool running = false;  // a thread is on its fiber
  uint32_t block = 0;    // of the launch
  int current = 0;       // the thread of it
  uint32_t now = 1, launch_began = 0, block_began = 0, block_barrier = 0;
  uint32_t warp_barrier[kMaxThreads / 32] = {};
  char* stacks = nullptr;
  uintptr_t kernel = 0, params = 0, params_end = 0;  // of this launch
  size_t shared_bytes = 0;                           // of this launch
  alignas(128) unsigned char shared[kSharedBytes];
};

extern Memory& memory;

// The memory of a tensor, which the kernels to come may touch.
void allow(const void* begin, size_t bytes);
void forget_allowed();

void begin_launch(const void* kernel, const void* params, size_t params_bytes, size_t shared_bytes);
void begin_block(uint32_t block);
void at_block_barrier();
void at_warp_barrier(int warp);

enum class Access { kRead, kWrite };
void access(const void* address, size_t bytes, Access kind);
// An asynchronous copy: until it has been waited for, nobody may touch what it writes.
void begin_copy(const void* to, const void* from, size_t bytes, bool reads);
void land_copy(const void* to, size_t bytes);

void check_alignment(const void* address, size_t bytes, const char* what);

// Ends the launch with an error that names the thread.
[[noreturn]] void fail(const std::string& message);
[[noreturn]] void leave_fiber(const std::string& error);

// A number below n from the launch's seed, TIUE_HOST_SEED; 0 where none is given.
void seed_order();
bool is_seeded();
int random_below(int n);

}  // namespace tiue::host
