// confusion_matrix: a histogram a block, then one addition a bin. Counts are integers: the order
// in which they are added does not change the result.
#include "ops/cuda/pixels.cuh"

namespace co2s::cuda {
namespace {

// The rule of argmax() in pixel_math.h for one class after the other.
template <class T> struct Best {
  T value;
  int32_t label = 0;

  __device__ __forceinline__ void see(T z, int32_t k) {
    const bool better = (value == value) & !(z <= value);
    value = select(better, z, value);
    label = select(better, k, label);
  }
};

// Adds pixels to the block's histogram, or to the matrix itself where that is too large. A thread's
// pixels that follow each other mostly fall into one bin: their count is added at once.
template <class T> class Counter {
public:
  __device__ __forceinline__ Counter(const ConfusionProblem<T>& problem)
      : problem_(problem), classes_(static_cast<int32_t>(problem.logits.classes)),
        bins_(reinterpret_cast<int32_t*>(dynamic_shared())),
        shared_(problem.logits.classes * problem.logits.classes <= kMostBins) {
    if (shared_) {
      for (int32_t i = thread_rank(); i < classes_ * classes_; i += kThreads) bins_[i] = 0;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void see(int32_t truth, int32_t prediction) {
    if (truth != truth_ || prediction != prediction_) {
      flush();
      truth_ = truth;
      prediction_ = prediction;
    }
    ++count_;
  }

  // Every thread of the block has to call it.
  __device__ __forceinline__ void finish() {
    flush();
    __syncthreads();
    if (!shared_) return;
    for (int32_t i = thread_rank(); i < classes_ * classes_; i += kThreads) {
      if (bins_[i] > 0) add(i / classes_, i % classes_, bins_[i]);
    }
  }

private:
  __device__ __forceinline__ void flush() {
    if (count_ > 0) {
      if (shared_) {
        atomicAdd(bins_ + truth_ * classes_ + prediction_, count_);
      } else {
        add(truth_, prediction_, count_);
      }
    }
    count_ = 0;
  }

  __device__ __forceinline__ void add(int32_t truth, int32_t prediction, int32_t count) {
    int64_t* bin = problem_.out + truth * problem_.out_row + prediction * problem_.out_column;
    atomicAdd(reinterpret_cast<unsigned long long*>(bin), static_cast<unsigned long long>(count));
  }

  const ConfusionProblem<T>& problem_;
  int32_t classes_;
  int32_t* bins_;
  bool shared_;
  int32_t truth_ = 0, prediction_ = 0, count_ = 0;
};

template <class S, int V>
__global__ void __launch_bounds__(kThreads)
    confusion_matrix_equal(const ConfusionProblem<Wide<S>> problem) {
  using T = Wide<S>;
  Counter<T> counter(problem);
  const VectorPosition at = vector_position(problem.grid, problem.blocks, V);
  if (at.inside) {
    PixelLabel labels[V];
    read_pixels(problem.maps, at, labels);
    bool any = false;
#pragma unroll
    for (int v = 0; v < V; ++v) any |= labels[v].label >= 0;
    if (any) {
      const StridedLogits<S> z(problem.logits, at.image, at.y, at.x);
      Best<T> best[V];
#pragma unroll 4
      for (int32_t k = 0; k < problem.logits.classes; ++k) {
        const auto pack = *reinterpret_cast<const Pack<S, V>*>(z.from + k * z.stride_k);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (k == 0) best[v].value = static_cast<T>(pack.value[v]);
          best[v].see(static_cast<T>(pack.value[v]), k);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (labels[v].label >= 0) counter.see(labels[v].label, best[v].label);
      }
    }
  }
  counter.finish();
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    confusion_matrix_up(const ConfusionProblem<Wide<S>> problem) {
  using T = Wide<S>;
  Counter<T> counter(problem);
  const ColumnPosition at = column_position(problem.grid, problem.blocks);
  if (at.y < at.y_end) {
    const auto classes = static_cast<int32_t>(problem.logits.classes);
    const Tap<T, int32_t> x = tap_at(problem.grid.x, at.x);
    const Mix mix = load_mix(problem.maps.mix, problem.maps.batch, at.image);
    for (int32_t row = at.y; row < at.y_end; ++row) {
      const int32_t label = read_pixel(problem.maps, mix, at.image, row, at.x).label;
      if (label < 0) continue;
      const BlendedLogits<S> z(problem.logits, at.image, tap_at(problem.grid.y, row), x);
      Best<T> best{z(0)};
#pragma unroll 4
      for (int32_t k = 1; k < classes; ++k) best.see(z(k), k);
      counter.see(label, best.label);
    }
  }
  counter.finish();
}

} // namespace

template <class T>
void launch_confusion_matrix(const ConfusionProblem<T>& problem, Stream stream) {
  const int64_t bins = problem.logits.classes * problem.logits.classes;
  const size_t bytes = bins <= kMostBins ? bins * sizeof(int32_t) : 0;
  with_kernel<T>(problem.logits.dtype, 0, [&](auto storage, auto) {
    using S = decltype(storage);
    if (!problem.grid.equal) {
      launch(confusion_matrix_up<S>, problem.blocks.all, dim3(kColumns, kThreads / kColumns),
             bytes, stream, problem);
    } else if (problem.vectors) {
      launch(confusion_matrix_equal<S, 16 / sizeof(S)>, problem.blocks.all, dim3(kThreads), bytes,
             stream, problem);
    } else {
      launch(confusion_matrix_equal<S, 1>, problem.blocks.all, dim3(kThreads), bytes, stream,
             problem);
    }
  });
}

template void launch_confusion_matrix(const ConfusionProblem<float>&, Stream);
template void launch_confusion_matrix(const ConfusionProblem<double>&, Stream);

} // namespace co2s::cuda
