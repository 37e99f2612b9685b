// The EMA on CUDA: one launch over all tensors of a model, a block a chunk, on the caller's stream.
//
// Bytes a parameter, bf16 reference and policy: 6 (two reads, one write); 12 with an fp32 shadow, whose reference is
// only written. The table lives in device memory and is built once, by the caller.
#include <cuda_runtime.h>

#ifndef DPO_FAST_WITH_CUDA
#define DPO_FAST_WITH_CUDA 1
#endif
#include "ema_chunk.h"

namespace dpo_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 7;  // caps registers at 72: 57 KiB of loads in flight a multiprocessor, and no spills

template <bool kStochastic>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    ema_kernel(const EmaRow* __restrict__ rows, const int32_t* __restrict__ chunk_rows, int64_t chunk_size,
               EmaBlend blend) {
  const EmaRow row = rows[chunk_rows[blockIdx.x]];
  const int64_t start = (static_cast<int64_t>(blockIdx.x) - row.first_chunk) * chunk_size;
  const int64_t left = row.numel - start;
  ema_dispatch<kStochastic>(row, start, left < chunk_size ? left : chunk_size, blend, static_cast<int>(threadIdx.x),
                            kThreads);
}

// Makes device current for this scope. The caller's device is back afterwards, also in torch's own runtime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) {
      status_ = cudaSetDevice(device);
      restore_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool restore_ = false;
  cudaError_t status_ = cudaSuccess;
};

const char* name_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* ema_cuda_refusal(int device) {
  const DeviceGuard guard(device);
  cudaError_t status = guard.status();
  cudaFuncAttributes attributes;
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, ema_kernel<true>);
  if (status != cudaSuccess) cudaGetLastError();  // a refusal is an answer, not a sticky error
  return name_of(status);
}

const char* ema_cuda(const EmaTable& table, const EmaBlend& blend, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return name_of(guard.status());
  const dim3 grid(static_cast<unsigned>(table.num_chunks)), block(kThreads);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (blend.stochastic) {
    ema_kernel<true><<<grid, block, 0, on>>>(table.rows, table.chunk_rows, table.chunk_size, blend);
  } else {
    ema_kernel<false><<<grid, block, 0, on>>>(table.rows, table.chunk_rows, table.chunk_size, blend);
  }
  return name_of(cudaGetLastError());
}

}  // namespace dpo_fast
