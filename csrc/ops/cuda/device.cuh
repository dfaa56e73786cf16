// What the kernels need of the machine: launching, shared memory and sums over a block.
//
// With CO2S_EMULATE_CUDA the same kernels compile for the CPU, to be tested without a GPU
// (tests/native/cuda_emulation).
#pragma once

#if defined(CO2S_EMULATE_CUDA)
#include "cuda_emulation.h"
#else
#include <c10/cuda/CUDAException.h>
#include <cuda_runtime.h>
#endif

#include "ops/cuda/problems.h"

namespace co2s::cuda {

// Blocks stand in one line, whatever they mean: only that axis of a grid is long enough for all.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
#if defined(CO2S_EMULATE_CUDA)
  static_cast<void>(stream);
  emulation::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(CO2S_EMULATE_CUDA)
  return emulation::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

__device__ __forceinline__ int thread_rank() {
  return static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x);
}

// Sum over the block's threads in a fixed order, valid in thread 0. Every thread has to call it,
// and the block has to be of whole warps.
template <class V> __device__ __forceinline__ V block_sum(V value) {
  __shared__ V warps[32];
  const int rank = thread_rank(), threads = static_cast<int>(blockDim.x * blockDim.y);
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (rank % 32 == 0) warps[rank / 32] = value;
  __syncthreads();
  V total = 0;
  if (rank == 0) {
    for (int i = 0; i < threads / 32; ++i) total += warps[i];
  }
  __syncthreads(); // the next sum uses the same memory
  return total;
}

// What a thread found in its few pixels.
template <int Sums> struct ThreadSums {
  double value[Sums] = {};
  int32_t count[2] = {};
};

template <int Sums>
__device__ __forceinline__ void store_partial(Partial* partial, const ThreadSums<Sums>& sums) {
  const long long both =
      block_sum(static_cast<long long>(sums.count[0]) + (static_cast<long long>(sums.count[1]) << 32));
  double value[2] = {};
  for (int i = 0; i < Sums; ++i) value[i] = block_sum(sums.value[i]);
  if (thread_rank() == 0) {
    partial[blockIdx.x] = {{value[0], value[1]}, {both & 0xffffffff, both >> 32}};
  }
}

} // namespace co2s::cuda
