// What every file of a form shares: vectors of float32 as wide as its instruction set, the names of
// its functions, memory, and loops over torch's threads.
//
// Each .cpp but library.cpp is compiled once a form (TIUE_FORM: portable, avx2, avx512) with the
// instructions of that form allowed, and the loader chooses one when it runs. So nothing here may
// have external linkage but the functions themselves: of two inline functions of one name the
// linker keeps either, and the one for AVX-512 would stop an older computer. Hence no containers
// either.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define TIUE_PASTED(form, name) tiue_##form##_##name
#define TIUE_NAME(form, name) TIUE_PASTED(form, name)
#define TIUE_EXPORT extern "C" __attribute__((visibility("default")))
// A function of this form, as in `TIUE_FUNCTION(void, winograd_input)(...)`.
#define TIUE_FUNCTION(result, name) TIUE_EXPORT result TIUE_NAME(TIUE_FORM, name)

#define TIUE_INLINE inline __attribute__((always_inline))

// The pointers of a loop never meet: without this a dozen of them are not vectorised.
#if defined(__clang__)
#define TIUE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define TIUE_INDEPENDENT _Pragma("GCC ivdep")
#endif

// torch's `torch_parallel_for` (its stable C interface), or a plain loop.
using Task = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Task task,
                                void* context);
extern "C" __attribute__((visibility("hidden"))) ParallelFor tiue_parallel_loop;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // NEON, SSE
#endif

// Sums that the registers hold beside what they are made of.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24, kMostRows = 16;
#else
constexpr int kSums = 12, kMostRows = 6;
#endif

using Vector = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));

TIUE_INLINE Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
TIUE_INLINE void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

// The larger one, b where either is NaN.
TIUE_INLINE Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  const Integers mask = a > b;
  return (Vector)(((Integers)a & mask) | ((Integers)b & ~mask));
#endif
}

TIUE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TIUE_INLINE int64_t parts_of(int64_t size, int64_t part) { return (size + part - 1) / part; }

// loop(begin, end) on torch's threads, over all of 0 to n.
template <class Loop>
inline void parallel_for(int64_t n, const Loop& loop) {
  if (n <= 0) return;
  const auto task = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Loop*>(context))(begin, end);
  };
  tiue_parallel_loop(0, n, 1, task, const_cast<Loop*>(&loop));
}

// Floats of one thread, which grow and are not kept.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() { std::free(data_); }

  float* take(int64_t n) {
    if (n > size_) {
      std::free(data_);
      data_ = static_cast<float*>(std::malloc(static_cast<size_t>(n) * sizeof(float)));
      if (data_ == nullptr) std::abort();
      size_ = n;
    }
    return data_;
  }

  float* take_zeros(int64_t n) {
    std::memset(take(n), 0, static_cast<size_t>(n) * sizeof(float));
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace
