// Runs CUDA kernels on the CPU, for tests: each thread of a block is a fiber, which gives way where
// it waits for others. Block after block; what a barrier does not order, CO2S_EMULATION_ORDER
// (forward, reverse, random) shuffles, so that a missing barrier shows.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static // one block at a time
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)

struct CUstream_st;
using cudaStream_t = CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern dim3 threadIdx, blockIdx, blockDim; // of the running fiber

void __syncthreads();

namespace emulation {

// Aborts, with a message, where threads wait for each other in vain or write past shared memory.
void run(int64_t blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);

// Poisoned with NaN at the start of each block.
unsigned char* dynamic_shared();

// Gives `bytes` of this thread to its warp and reads those of the lane `step` further.
void exchange(void* value, size_t bytes, int step);

} // namespace emulation

template <class V> V __shfl_down_sync(unsigned, V value, int step) {
  emulation::exchange(&value, sizeof(V), step);
  return value;
}

template <class V> V atomicAdd(V* to, V value) {
  const V before = *to;
  *to += value;
  return before;
}

using std::fma;
using std::fmaf;
