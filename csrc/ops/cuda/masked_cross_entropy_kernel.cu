// masked_cross_entropy: the logits of pixels that are taken are read once, the others not at all.
#include "ops/cuda/masked_cross_entropy.cuh"

namespace co2s::cuda {
namespace {

template <class T, int V>
__device__ __forceinline__ void count_labels(const PixelLabel (&labels)[V], ThreadSums<1>& sums) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    sums.count[0] += labels[v].valid;
    sums.count[1] += labels[v].label >= 0;
  }
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    masked_cross_entropy_equal(const CrossEntropyProblem<Wide<S>> problem) {
  using T = Wide<S>;
  constexpr int V = kVectorLength<S, N, 1>;
  const VectorPosition at = vector_position(problem.grid, problem.blocks, V);
  ThreadSums<1> sums;
  if (at.inside) {
    PixelLabel labels[V];
    read_pixels(problem.maps, at, labels);
    count_labels<T>(labels, sums);
    T loss[V] = {};
    if (sums.count[1] > 0) {
      if constexpr (N > 0) {
        Vectors<S, N, V> logits;
        logits.load(problem.logits, at);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (labels[v].label < 0) continue;
          T z[N];
          logits.get(v, z);
          loss[v] = pixel_loss(z, labels[v].label, class_weight(problem, labels[v].label));
        }
      } else {
        loss[0] = pixel_loss_in_a_pass<T>(StridedLogits<S>(problem.logits, at.image, at.y, at.x),
                                          static_cast<int32_t>(problem.logits.classes),
                                          labels[0].label, class_weight(problem, labels[0].label));
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) sums.value[0] += loss[v];
    if (problem.loss_map != nullptr) {
      const int64_t image = static_cast<int64_t>(problem.grid.y.out) * problem.grid.x.out;
      store_vector(problem.loss_map + at.image * image + at.pixel, loss);
    }
  }
  store_partial(problem.partial, sums);
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    masked_cross_entropy_up(const CrossEntropyProblem<Wide<S>> problem) {
  using T = Wide<S>;
  const ColumnPosition at = column_position(problem.grid, problem.blocks);
  ThreadSums<1> sums;
  if (at.y < at.y_end) {
    const auto classes = static_cast<int32_t>(problem.logits.classes);
    const Tap<T, int32_t> x = tap_at(problem.grid.x, at.x);
    const Mix mix = load_mix(problem.maps.mix, problem.maps.batch, at.image);
    Column<S, N> column;
    if constexpr (N > 0) column.start(problem.logits, at.image, x, 0, classes);
    LabelColumn labels;
    labels.start();
    for (int32_t row = at.y; row < at.y_end; ++row) {
      const PixelLabel pixel =
          labels.next(problem.maps, mix, at.image, row, at.x, problem.grid.y.out);
      sums.count[0] += pixel.valid;
      T loss = 0;
      if (pixel.label >= 0) {
        ++sums.count[1];
        const T weight = class_weight(problem, pixel.label);
        const Tap<T, int32_t> y = tap_at(problem.grid.y, row);
        if constexpr (N > 0) {
          T z[N];
          column.seek(y.index0);
          column.get(y, z);
          loss = pixel_loss(z, pixel.label, weight);
        } else {
          loss = pixel_loss_in_a_pass<T>(BlendedLogits<S>(problem.logits, at.image, y, x), classes,
                                         pixel.label, weight);
        }
      }
      sums.value[0] += loss;
      if (problem.loss_map != nullptr) {
        problem.loss_map[(at.image * problem.grid.y.out + row) * problem.grid.x.out + at.x] = loss;
      }
    }
  }
  store_partial(problem.partial, sums);
}

} // namespace

template <class T>
void launch_cross_entropy(const CrossEntropyProblem<T>& problem, Stream stream) {
  with_kernel<T>(problem.logits.dtype, problem.registers, [&](auto storage, auto registers) {
    using S = decltype(storage);
    constexpr int N = decltype(registers)::value;
    if (problem.grid.equal) {
      launch(masked_cross_entropy_equal<S, N>, problem.blocks.all, dim3(kThreads), 0, stream,
             problem);
    } else {
      launch(masked_cross_entropy_up<S, N>, problem.blocks.all,
             dim3(kColumns, kThreads / kColumns), 0, stream, problem);
    }
  });
}

template void launch_cross_entropy(const CrossEntropyProblem<float>&, Stream);
template void launch_cross_entropy(const CrossEntropyProblem<double>&, Stream);

} // namespace co2s::cuda
