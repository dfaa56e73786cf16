// The loss of one pixel and its slope, for the kernels of masked_cross_entropy.
#pragma once

#include "ops/cuda/pixel_columns.cuh"

namespace co2s::cuda {

// What the passes after the first need of a pixel; label is kNotTaken where it is not taken.
template <class T> struct alignas(4 * sizeof(T)) CrossEntropyStatistics {
  T max, scaled, weight;
  int32_t label;
};
static_assert(sizeof(CrossEntropyStatistics<float>) == kCrossEntropyStatisticsItems * sizeof(float));
static_assert(sizeof(CrossEntropyStatistics<double>) ==
              kCrossEntropyStatisticsItems * sizeof(double));

template <class T>
__device__ __forceinline__ T class_weight(const CrossEntropyProblem<T>& problem, int32_t label) {
  return problem.class_weight == nullptr ? T(1) : problem.class_weight[label];
}

// Class weight times the gradient from above.
template <class T>
__device__ __forceinline__ T slope_weight(const CrossEntropyProblem<T>& problem, int32_t label,
                                          int64_t pixel) {
  return problem.upstream[problem.per_pixel ? pixel : 0] * class_weight(problem, label);
}

// z becomes exp(z - max z); returns their sum, and z_label - max z.
template <class T, int N>
__device__ __forceinline__ T exponentials_and_label(T (&z)[N], int32_t label, T* shifted_label) {
  subtract_max(z, N);
  *shifted_label = z[0];
#pragma unroll
  for (int k = 1; k < N; ++k) *shifted_label = k == label ? z[k] : *shifted_label;
#pragma unroll
  for (int k = 0; k < N; ++k) z[k] = exp_nonpositive(z[k]);
  return sum_of(z, N);
}

// Exponentials and their sum become the slope: weight * (softmax_k - [k == label]).
template <class T, int N>
__device__ __forceinline__ void to_slope(T (&e)[N], T sum, int32_t label, T weight) {
  const T scaled = quotient(weight, sum);
#pragma unroll
  for (int k = 0; k < N; ++k) e[k] = fma(e[k], scaled, k == label ? -weight : T(0));
}

// z becomes the slope.
template <class T, int N>
__device__ __forceinline__ void pixel_slope(T (&z)[N], int32_t label, T weight) {
  const T sum = exponentials(z, N);
  to_slope(z, sum, label, weight);
}

// The loss of a few dozen pixels, for which T is exact enough. Without class weights the logarithm is
// that of the product of their Σ exp(z - max): logarithms cost more than all else of a pixel.
template <class T> struct PixelLosses {
  T total = 0, product = 1;

  __device__ __forceinline__ void add(T sum, T shifted_label, const T* class_weight,
                                      int32_t label) {
    if (class_weight != nullptr) {
      total += cross_entropy(sum, shifted_label, class_weight[label]);
      return;
    }
    constexpr T kLarge = T(1e28); // times a sum, at most the number of classes, it is finite
    total -= shifted_label;
    product *= sum;
    if (product > kLarge) {
      total += log_positive(product);
      product = T(1);
    }
  }

  __device__ __forceinline__ T finished() const { return total + log_positive(product); }
};

// z becomes the slope; the loss is added where `own`.
template <class T, int N>
__device__ __forceinline__ void pixel_loss_and_slope(const CrossEntropyProblem<T>& problem,
                                                     T (&z)[N], int32_t label, bool own,
                                                     PixelLosses<T>& losses) {
  T shifted_label;
  const T sum = exponentials_and_label(z, label, &shifted_label);
  if (own) losses.add(sum, shifted_label, problem.class_weight, label);
  to_slope(z, sum, label, class_weight(problem, label));
}

// The slope of class k where `statistics` came from a pass before.
template <class T>
__device__ __forceinline__ T slope_of_class(T z, int32_t k,
                                            const CrossEntropyStatistics<T>& statistics) {
  return cross_entropy_slope(exp_nonpositive(z - statistics.max), statistics.scaled,
                             k == statistics.label, statistics.weight);
}

template <class T, class Z>
__device__ __forceinline__ CrossEntropyStatistics<T> statistics_in_a_pass(
    const CrossEntropyProblem<T>& problem, const Z& z, int32_t label, int64_t pixel) {
  T of_label;
  const OnlineSoftmax<T> state =
      softmax_in_a_pass<T>(z, static_cast<int32_t>(problem.logits.classes), label, &of_label);
  const T weight = slope_weight(problem, label, pixel);
  return {state.max, quotient(weight, state.sum), weight, label};
}

} // namespace co2s::cuda
