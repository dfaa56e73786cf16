// The second step of every sum: the blocks' partial sums, added in a fixed order.
#include "ops/cuda/device.cuh"

namespace co2s::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_partials(const Partial* partial, int64_t blocks, const Totals<T> totals) {
  double value[2] = {};
  long long count[2] = {};
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    for (int j = 0; j < 2; ++j) {
      value[j] += partial[i].value[j];
      count[j] += partial[i].count[j];
    }
  }
  for (int j = 0; j < 2; ++j) {
    count[j] = block_sum(count[j]);
    value[j] = block_sum(value[j]);
  }
  if (threadIdx.x != 0) return;
  for (int j = 0; j < 2; ++j) {
    totals.counts[j] = count[j];
    if (j >= totals.values) continue;
    double divisor = 1;
    if (totals.scale != nullptr) {
      const long long chosen = totals.mean_over[j] == 0 ? count[0] : count[1];
      divisor = static_cast<double>(totals.times * (chosen > 1 ? chosen : 1));
      totals.scale[j] = static_cast<T>(1 / divisor);
    }
    totals.sums[j] = static_cast<T>(value[j] / divisor);
  }
}

} // namespace

template <class T>
void launch_sum_partials(const Partial* partial, int64_t blocks, const Totals<T>& totals,
                         Stream stream) {
  launch(sum_partials<T>, 1, dim3(kThreads), 0, stream, partial, blocks, totals);
}

template void launch_sum_partials(const Partial*, int64_t, const Totals<float>&, Stream);
template void launch_sum_partials(const Partial*, int64_t, const Totals<double>&, Stream);

} // namespace co2s::cuda
