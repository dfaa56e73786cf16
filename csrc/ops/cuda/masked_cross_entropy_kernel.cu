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

// Σ exp(z - max) of a pixel and z_label - max.
template <class T> struct LabelledSum {
  T sum, shifted_label;
};

template <class T, int N>
__device__ __forceinline__ LabelledSum<T> labelled_sum(T (&z)[N], int32_t label) {
  LabelledSum<T> found;
  found.sum = exponentials_and_label(z, label, &found.shifted_label);
  return found;
}

template <class T, class Z>
__device__ __forceinline__ LabelledSum<T> labelled_sum_in_a_pass(const Z& z, int32_t classes,
                                                                 int32_t label) {
  T of_label;
  const OnlineSoftmax<T> state = softmax_in_a_pass<T>(z, classes, label, &of_label);
  return {state.sum, of_label - state.max};
}

// A pixel's loss where a map is wanted; else it is added to the sum, and 0.
template <class T>
__device__ __forceinline__ T loss_or_add(const CrossEntropyProblem<T>& problem,
                                         const LabelledSum<T>& found, int32_t label,
                                         PixelLosses<T>& losses) {
  if (problem.loss_map != nullptr) {
    return cross_entropy(found.sum, found.shifted_label, class_weight(problem, label));
  }
  losses.add(found.sum, found.shifted_label, problem.class_weight, label);
  return T(0);
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
    PixelLosses<T> losses;
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
          loss[v] = loss_or_add(problem, labelled_sum(z, labels[v].label), labels[v].label, losses);
        }
      } else {
        const StridedLogits<S> z(problem.logits, at.image, at.y, at.x);
        const auto found = labelled_sum_in_a_pass<T>(
            z, static_cast<int32_t>(problem.logits.classes), labels[0].label);
        loss[0] = loss_or_add(problem, found, labels[0].label, losses);
      }
      sums.value[0] = losses.finished();
    }
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
    PixelLosses<T> losses;
    for (int32_t row = at.y; row < at.y_end; ++row) {
      const int32_t label =
          labels.next(problem.maps, mix, at.image, row, at.x, problem.grid.y.out);
      sums.count[0] += is_valid(label);
      T loss = 0;
      if (is_taken(label)) {
        ++sums.count[1];
        const Tap<T, int32_t> y = tap_at(problem.grid.y, row);
        LabelledSum<T> found;
        if constexpr (N > 0) {
          T z[N];
          column.seek(y.index0);
          column.get(y, z);
          found = labelled_sum(z, label);
        } else {
          found = labelled_sum_in_a_pass<T>(BlendedLogits<S>(problem.logits, at.image, y, x),
                                            classes, label);
        }
        loss = loss_or_add(problem, found, label, losses);
      }
      if (problem.loss_map != nullptr) {
        problem.loss_map[(at.image * problem.grid.y.out + row) * problem.grid.x.out + at.x] = loss;
      }
    }
    sums.value[0] = losses.finished();
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
