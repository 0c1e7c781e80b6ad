// Tensors of the stable ABI on one side, launches on the other.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "device.h"

#ifndef TIUE_HOST
#include <dlfcn.h>
#endif

namespace tiue {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef TIUE_HOST

struct Device {
  explicit Device(const Tensor&) { host::forget_allowed(); }
  // Tests lower it to reach, on small maps, what large ones do on a GPU.
  size_t shared_bytes() const {
    const char* limit = std::getenv("TIUE_HOST_SHARED_BYTES");
    return limit ? std::strtoull(limit, nullptr, 10) : host::kSharedBytes;
  }
  int multiprocessors() const { return 2; }
  template <typename Params>
  void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes,
              const Params& params) const {
    STD_TORCH_CHECK(shared_bytes <= std::max(this->shared_bytes(), size_t{48 * 1024}),
                    "the kernel needs more shared memory than this device has");
    host::launch(kernel, blocks, threads, shared_bytes, params);
  }
};

#else

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// libtorch_cuda is looked up when the first kernel is launched: a strong reference to it would keep
// this library from loading beside a CPU build of torch.
inline cudaStream_t current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Function>(symbol);
  }();
  STD_TORCH_CHECK(function, "this torch has no CUDA: its current stream cannot be found");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The device of a tensor, made current for as long as this lives.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_), stream_(current_stream(index_)) {
    check_cuda(cudaSetDevice(index_), "cudaSetDevice");
  }

  size_t shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  template <typename Params>
  void launch(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes,
              const Params& params) const {
    if (!blocks) return;
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "a grid of ", blocks, " blocks is too large");
    if (shared_bytes > 48 * 1024) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 "the kernel needs more shared memory than this device has");
    }
    void* arguments[] = {const_cast<Params*>(&params)};
    check_cuda(
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(threads), arguments, shared_bytes, stream_),
        "kernel launch");
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index_), "cudaDeviceGetAttribute");
    return value;
  }

  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#endif

// Calls function(T{}) for the element type of a tensor.
template <typename Function>
void dispatch_float(const Tensor& tensor, Function function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "float32, float16 or bfloat16 expected");
  }
}

// The memory of a tensor, for a kernel.
inline void* memory_of(const Tensor& tensor) {
#ifdef TIUE_HOST
  int64_t extent = tensor.numel() ? 1 : 0;
  for (int64_t i = 0; extent && i < tensor.dim(); ++i) {
    extent += (tensor.size(i) - 1) * tensor.stride(i);
  }
  host::allow(tensor.data_ptr(), static_cast<size_t>(extent) * tensor.element_size());
#endif
  return tensor.data_ptr();
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(memory_of(tensor));
}

inline bool is_aligned(const Tensor& tensor, size_t bytes) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes == 0;
}

inline Tensor new_float(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

inline FloatArray float_array(const Tensor& tensor) {
  ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
      "norm weights must be float32, float16 or bfloat16");
  return {memory_of(tensor), type == ScalarType::Float ? 4 : type == ScalarType::Half ? 2 : -2};
}

// out[i] = sum over rows of partial[row][i], in order: columns from `border` on have fewer rows.
template <typename T>
struct SumRowsParams {
  const float* partial;
  T* out;
  int64_t columns, border;
  int rows, rows_beyond;
};

template <typename T>
__global__ void sum_rows_kernel(SumRowsParams<T> params) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= params.columns) return;
  int rows = i < params.border ? params.rows : params.rows_beyond;
  float sum = 0.0f;
#pragma unroll 4
  for (int row = 0; row < rows; ++row) sum += params.partial[row * params.columns + i];
  params.out[i] = from_float<T>(sum);
}

inline void sum_rows(const Device& device, const float* partial, const Tensor& out, int rows,
                     int64_t border, int rows_beyond) {
  constexpr int kThreads = 128;
  int64_t columns = out.numel();
  dispatch_float(out, [&](auto zero) {
    using T = decltype(zero);
    SumRowsParams<T> params{partial, data<T>(out), columns, border, rows, rows_beyond};
    device.launch(sum_rows_kernel<T>, (columns + kThreads - 1) / kThreads, kThreads, 0, params);
  });
}

}  // namespace tiue
