// What two students' logits say at one pixel, for the kernels of stability_loss.
#pragma once

#include "ops/cuda/pixel_columns.cuh"

namespace co2s::cuda {

// Which student learns, and Σ_k (p_k - q_k)². p, q: softmax of a, of b.
template <class T> struct Comparison {
  bool a_learns = false, b_learns = false;
  T squares = 0;
};

// What the passes after the first need of a pixel.
template <class T> struct alignas(8 * sizeof(T)) StabilityStatistics {
  T max_a, inverse_a, max_b, inverse_b, mean_a, mean_b;
  int32_t a_learns, b_learns;
};
static_assert(sizeof(StabilityStatistics<float>) == kStabilityStatisticsItems * sizeof(float));
static_assert(sizeof(StabilityStatistics<double>) == kStabilityStatisticsItems * sizeof(double));

// Logits become probabilities where some student learns.
template <class T, int N>
__device__ __forceinline__ Comparison<T> compare(T (&p)[N], T (&q)[N], T threshold) {
  const T inverse_a = confidence_of(exponentials(p, N));
  const T inverse_b = confidence_of(exponentials(q, N));
  const auto who = learners(inverse_a, inverse_b, threshold);
  Comparison<T> found;
  found.a_learns = who.a;
  found.b_learns = who.b;
  if (!who.a && !who.b) return found;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    p[k] *= inverse_a;
    q[k] *= inverse_b;
    found.squares = fma(p[k] - q[k], p[k] - q[k], found.squares);
  }
  return found;
}

// The pixel's share of the sums and counts.
template <class Sums, class T>
__device__ __forceinline__ void add(Sums& sums, const Comparison<T>& found) {
  sums.value[0] += found.a_learns ? found.squares : T(0);
  sums.value[1] += found.b_learns ? found.squares : T(0);
  sums.count[0] += found.a_learns;
  sums.count[1] += found.b_learns;
}

template <class T, class Z>
__device__ __forceinline__ Comparison<T> compare_in_passes(const Z& a, const Z& b, int32_t classes,
                                                           T threshold,
                                                           StabilityStatistics<T>* statistics) {
  T unused;
  const OnlineSoftmax<T> state_a = softmax_in_a_pass<T>(a, classes, kNotTaken, &unused);
  const OnlineSoftmax<T> state_b = softmax_in_a_pass<T>(b, classes, kNotTaken, &unused);
  const T inverse_a = confidence_of(state_a.sum), inverse_b = confidence_of(state_b.sum);
  const auto who = learners(inverse_a, inverse_b, threshold);
  Comparison<T> found;
  found.a_learns = who.a;
  found.b_learns = who.b;
  T mean_a = 0, mean_b = 0;
  if (who.a || who.b) {
#pragma unroll 4
    for (int32_t k = 0; k < classes; ++k) {
      const T p = exp_nonpositive(a(k) - state_a.max) * inverse_a;
      const T q = exp_nonpositive(b(k) - state_b.max) * inverse_b;
      found.squares = fma(p - q, p - q, found.squares);
      mean_a = fma(p, p - q, mean_a);
      mean_b = fma(q, q - p, mean_b);
    }
  }
  *statistics = {state_a.max, inverse_a, state_b.max, inverse_b, mean_a, mean_b, who.a, who.b};
  return found;
}

// The slopes of a learner with probabilities p that is taught by q.
template <class T, int N>
__device__ __forceinline__ void learner_slopes(const T (&p)[N], const T (&q)[N], T scale, T* g) {
  T mean_difference = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) mean_difference = fma(p[k], p[k] - q[k], mean_difference);
#pragma unroll
  for (int k = 0; k < N; ++k) g[k] = scale * stability_slope(p[k], p[k] - q[k], mean_difference);
}

// The slopes of one class, from its logits, where `statistics` came from a pass before.
template <class T>
__device__ __forceinline__ void class_slopes(T& z_a, T& z_b, const StabilityStatistics<T>& of,
                                             const T (&scale)[2]) {
  const T p = exp_nonpositive(z_a - of.max_a) * of.inverse_a;
  const T q = exp_nonpositive(z_b - of.max_b) * of.inverse_b;
  z_a = of.a_learns ? scale[0] * stability_slope(p, p - q, of.mean_a) : T(0);
  z_b = of.b_learns ? scale[1] * stability_slope(q, q - p, of.mean_b) : T(0);
}

} // namespace co2s::cuda
