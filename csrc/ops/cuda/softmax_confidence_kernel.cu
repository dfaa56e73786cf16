// softmax_confidence: every logit is read once, on equal grids 16 bytes a thread.
#include "ops/cuda/logits.cuh"

namespace co2s::cuda {
namespace {

template <class T> struct Prediction {
  T confidence;
  int64_t label;
};

template <class T>
__device__ __forceinline__ Prediction<T> predict(T sum, int32_t label) {
  return {confidence_of(sum), sum == sum ? label : 0}; // a NaN has no class: 0
}

// The label is the lowest class without distance to the maximum.
template <class T, int N> __device__ __forceinline__ Prediction<T> predict(T (&z)[N]) {
  subtract_max(z, N);
  int32_t label = 0;
#pragma unroll
  for (int k = N - 1; k > 0; --k) label = z[k] == T(0) ? k : label;
  label = z[0] == T(0) ? 0 : label;
#pragma unroll
  for (int k = 0; k < N; ++k) z[k] = exp_nonpositive(z[k]);
  return predict(sum_of(z, N), label);
}

template <class T, class Z>
__device__ __forceinline__ Prediction<T> predict_in_a_pass(const Z& z, int32_t classes) {
  T best = z(0);
  OnlineSoftmax<T> state = begin_softmax(best);
  int32_t label = 0;
#pragma unroll 4
  for (int32_t k = 1; k < classes; ++k) {
    const T value = z(k);
    add_logit(state, value);
    label = value > best ? k : label; // NaN: the label is 0 in the end
    best = value > best ? value : best;
  }
  return predict(finished(state).sum, label);
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    softmax_confidence_equal(const ConfidenceProblem<Wide<S>> problem) {
  using T = Wide<S>;
  constexpr int V = kVectorLength<S, N, 1>;
  const VectorPosition at = vector_position(problem.grid, problem.blocks, V);
  if (!at.inside) return;
  T confidence[V];
  int64_t label[V];
  if constexpr (N > 0) {
    Vectors<S, N, V> logits;
    logits.load(problem.logits, at);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      T z[N];
      logits.get(v, z);
      const Prediction<T> found = predict(z);
      confidence[v] = found.confidence;
      label[v] = found.label;
    }
  } else {
    const StridedLogits<S> z(problem.logits, at.image, at.y, at.x);
    const Prediction<T> found =
        predict_in_a_pass<T>(z, static_cast<int32_t>(problem.logits.classes));
    confidence[0] = found.confidence;
    label[0] = found.label;
  }
  const int64_t out =
      at.image * (static_cast<int64_t>(problem.grid.y.out) * problem.grid.x.out) + at.pixel;
  store_vector(problem.confidence + out, confidence);
  if (problem.label != nullptr) {
    store_vector(problem.label + out, label);
  } else {
    uint8_t bytes[V];
#pragma unroll
    for (int v = 0; v < V; ++v) bytes[v] = static_cast<uint8_t>(label[v]);
    store_vector(problem.byte_label + out, bytes);
  }
}

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    softmax_confidence_up(const ConfidenceProblem<Wide<S>> problem) {
  using T = Wide<S>;
  const ColumnPosition at = column_position(problem.grid, problem.blocks);
  if (at.y >= at.y_end) return;
  const auto classes = static_cast<int32_t>(problem.logits.classes);
  const Tap<T, int32_t> x = tap_at(problem.grid.x, at.x);
  Column<S, N> column;
  if constexpr (N > 0) column.start(problem.logits, at.image, x, 0, classes);
  for (int32_t row = at.y; row < at.y_end; ++row) {
    const Tap<T, int32_t> y = tap_at(problem.grid.y, row);
    Prediction<T> found;
    if constexpr (N > 0) {
      T z[N];
      column.seek(y.index0);
      column.get(y, z);
      found = predict(z);
    } else {
      found = predict_in_a_pass<T>(BlendedLogits<S>(problem.logits, at.image, y, x), classes);
    }
    const int64_t out = (at.image * problem.grid.y.out + row) * problem.grid.x.out + at.x;
    problem.confidence[out] = found.confidence;
    if (problem.label != nullptr) {
      problem.label[out] = found.label;
    } else {
      problem.byte_label[out] = static_cast<uint8_t>(found.label);
    }
  }
}

} // namespace

template <class T>
void launch_softmax_confidence(const ConfidenceProblem<T>& problem, Stream stream) {
  with_kernel<T>(problem.logits.dtype, problem.registers, [&](auto storage, auto registers) {
    using S = decltype(storage);
    constexpr int N = decltype(registers)::value;
    if (problem.grid.equal) {
      launch(softmax_confidence_equal<S, N>, problem.blocks.all, dim3(kThreads), 0, stream,
             problem);
    } else {
      launch(softmax_confidence_up<S, N>, problem.blocks.all,
             dim3(kColumns, kThreads / kColumns), 0, stream, problem);
    }
  });
}

template void launch_softmax_confidence(const ConfidenceProblem<float>&, Stream);
template void launch_softmax_confidence(const ConfidenceProblem<double>&, Stream);

} // namespace co2s::cuda
