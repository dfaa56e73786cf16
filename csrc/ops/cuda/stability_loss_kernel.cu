// stability_loss: both students' logits are read once.
#include "ops/cuda/stability_loss.cuh"

namespace co2s::cuda {
namespace {

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    stability_loss_equal(const StabilityProblem<Wide<S>> problem) {
  using T = Wide<S>;
  constexpr int V = kVectorLength<S, N, 2>;
  const VectorPosition at = vector_position(problem.grid, problem.blocks, V);
  ThreadSums<2> sums;
  if (at.inside) {
    bool unmasked[V];
    read_unmasked(problem.maps, at, unmasked);
    bool any = false;
#pragma unroll
    for (int v = 0; v < V; ++v) any |= unmasked[v];
    if constexpr (N > 0) {
      if (any) {
        Vectors<S, N, V> a, b;
        a.load(problem.logits[0], at);
        b.load(problem.logits[1], at);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (!unmasked[v]) continue;
          T p[N], q[N];
          a.get(v, p);
          b.get(v, q);
          add(sums, compare(p, q, problem.threshold));
        }
      }
    } else if (any) {
      StabilityStatistics<T> unused;
      add(sums, compare_in_passes(StridedLogits<S>(problem.logits[0], at.image, at.y, at.x),
                                  StridedLogits<S>(problem.logits[1], at.image, at.y, at.x),
                                  static_cast<int32_t>(problem.logits[0].classes),
                                  problem.threshold, &unused));
    }
  }
  store_partial(problem.partial, sums);
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    stability_loss_up(const StabilityProblem<Wide<S>> problem) {
  using T = Wide<S>;
  const ColumnPosition at = column_position(problem.grid, problem.blocks);
  ThreadSums<2> sums;
  if (at.y < at.y_end) {
    const auto classes = static_cast<int32_t>(problem.logits[0].classes);
    const Tap<T, int32_t> x = tap_at(problem.grid.x, at.x);
    Column<S, N> a, b;
    if constexpr (N > 0) {
      a.start(problem.logits[0], at.image, x, 0, classes);
      b.start(problem.logits[1], at.image, x, 0, classes);
    }
    MaskColumn mask;
    mask.start();
    for (int32_t row = at.y; row < at.y_end; ++row) {
      if (!mask.next(problem.maps, at.image, row, at.x, problem.grid.y.out)) continue;
      const Tap<T, int32_t> y = tap_at(problem.grid.y, row);
      if constexpr (N > 0) {
        T p[N], q[N];
        a.seek(y.index0);
        b.seek(y.index0);
        a.get(y, p);
        b.get(y, q);
        add(sums, compare(p, q, problem.threshold));
      } else {
        StabilityStatistics<T> unused;
        add(sums, compare_in_passes(BlendedLogits<S>(problem.logits[0], at.image, y, x),
                                    BlendedLogits<S>(problem.logits[1], at.image, y, x), classes,
                                    problem.threshold, &unused));
      }
    }
  }
  store_partial(problem.partial, sums);
}

} // namespace

template <class T> void launch_stability(const StabilityProblem<T>& problem, Stream stream) {
  with_kernel<T>(problem.logits[0].dtype, problem.registers, [&](auto storage, auto registers) {
    using S = decltype(storage);
    constexpr int N = decltype(registers)::value;
    if (problem.grid.equal) {
      launch(stability_loss_equal<S, N>, problem.blocks.all, dim3(kThreads), 0, stream, problem);
    } else {
      launch(stability_loss_up<S, N>, problem.blocks.all, dim3(kColumns, kThreads / kColumns), 0,
             stream, problem);
    }
  });
}

template void launch_stability(const StabilityProblem<float>&, Stream);
template void launch_stability(const StabilityProblem<double>&, Stream);

} // namespace co2s::cuda
