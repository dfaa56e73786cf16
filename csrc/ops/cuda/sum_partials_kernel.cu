// The second step of every sum: the blocks' partial sums, added in a fixed order.
#include "ops/cuda/device.cuh"

namespace co2s::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials(const Partial* partial, int64_t blocks, int values, T* sums, int64_t* counts) {
  double value[2] = {};
  long long count[2] = {};
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    for (int j = 0; j < 2; ++j) {
      value[j] += partial[i].value[j];
      count[j] += partial[i].count[j];
    }
  }
  for (int j = 0; j < 2; ++j) {
    const double total = block_sum(value[j]);
    const long long all = block_sum(count[j]);
    if (threadIdx.x == 0) {
      if (j < values) sums[j] = static_cast<T>(total);
      counts[j] = all;
    }
  }
}

} // namespace

template <class T>
void launch_sum_partials(const Partial* partial, int64_t blocks, int values, T* sums,
                         int64_t* counts, Stream stream) {
  launch(sum_partials<T>, 1, dim3(kThreads), 0, stream, partial, blocks, values, sums, counts);
}

template void launch_sum_partials(const Partial*, int64_t, int, float*, int64_t*, Stream);
template void launch_sum_partials(const Partial*, int64_t, int, double*, int64_t*, Stream);

} // namespace co2s::cuda
