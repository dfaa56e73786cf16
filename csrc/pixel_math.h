// The arithmetic of one pixel, written once for host and device.
//
// V is float or double for one pixel (CUDA, tests), or a vector of pixels (csrc/ops/cpu/simd.h).
// A vector type brings its own max_keep_nan, select, exp_nonpositive and log_positive, found by
// argument-dependent lookup. K classes, z logits of one pixel, e = exp(z - max z).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define CO2S_HD static __host__ __device__ __forceinline__
#else
#define CO2S_HD [[maybe_unused]] static inline __attribute__((always_inline))
#endif

namespace co2s {

// ---- choosing ---------------------------------------------------------------------------------

template <class V> CO2S_HD V max_keep_nan(V bound, V x) { return bound > x ? bound : x; }
CO2S_HD float select(bool mask, float a, float b) { return mask ? a : b; }
CO2S_HD double select(bool mask, double a, double b) { return mask ? a : b; }
CO2S_HD int32_t select(bool mask, int32_t a, int32_t b) { return mask ? a : b; }

// The larger of two; of a NaN and a number, either.
template <class V> CO2S_HD V larger(V a, V b) { return max_keep_nan(a, b); }
#if defined(__CUDACC__)
CO2S_HD float larger(float a, float b) { return fmaxf(a, b); } // one instruction
#endif

// x from [0, 1], not NaN.
CO2S_HD double clamped_to_one(double x) { return x < 0 ? 0 : (x > 1 ? 1 : x); }
CO2S_HD float clamped_to_one(float x) {
#if defined(__CUDA_ARCH__)
  return __saturatef(x); // one instruction, or none
#else
  return x < 0 ? 0 : (x > 1 ? 1 : x);
#endif
}

// ---- bilinear source index, as ATen's area_pixel_compute_source_index -------------------------

// Where output position i reads: lower * in[index0] + upper * in[index1].
template <class T, class I = int64_t> struct Tap {
  I index0, index1;
  T lower, upper;
};

template <class T>
CO2S_HD T interpolation_scale(int64_t in_size, int64_t out_size, bool align_corners) {
  if (align_corners) {
    return out_size > 1 ? static_cast<T>(in_size - 1) / static_cast<T>(out_size - 1) : T(0);
  }
  return static_cast<T>(in_size) / static_cast<T>(out_size);
}

// Where position i lies among the inputs, from 0 on. Arithmetic in T throughout, because float32
// rounding of the index is part of what F.interpolate computes for float32 tensors.
template <class T, class I> CO2S_HD T interpolation_source(I i, T scale, bool align_corners) {
  const T half = align_corners ? T(0) : T(0.5);
  return larger(scale * (static_cast<T>(i) + half) - half, T(0));
}

// The tap of a position at `source`, whose index0 is known.
template <class T, class I> CO2S_HD Tap<T, I> tap_from(T source, I index0, I in_size) {
  const T upper = clamped_to_one(source - static_cast<T>(index0));
  return {index0, index0 + (index0 < in_size - 1), T(1) - upper, upper};
}

template <class T, class I>
CO2S_HD Tap<T, I> interpolation_tap(I i, I in_size, T scale, bool align_corners) {
  const T source = interpolation_source(i, scale, align_corners);
  const I index0 = static_cast<I>(source);
  return tap_from(source, index0 < in_size - 1 ? index0 : in_size - 1, in_size);
}

// ---- exp and log ------------------------------------------------------------------------------

namespace constants {
// exp(x) underflows below; e^-87 is as good as 0 in a sum that holds a 1.
constexpr float kExpLowest = -87.0f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693145751953125f; // 11 bits shorter than ln 2: n * kLn2High is exact
constexpr float kLn2Low = 1.42860682030941723e-6f;
// 1.5 * 2^23 + 127: adding it rounds to an integer n and leaves the exponent bits of 2^n in place.
constexpr float kRoundMagic = 12583039.0f;
// exp(r) = 1 + r + r^2 * q(r), minimax on |r| <= ln(2) / 2 by Remez exchange, relative error 1.1e-7.
constexpr float kExp2 = 0.499992288256f, kExp3 = 0.166671163133f, kExp4 = 0.0418905499843f,
                kExp5 = 0.0083124777016f;
} // namespace constants

// The reduced polynomial, shared by the scalar and the vector exp.
template <class V> CO2S_HD V exp_polynomial(V r) {
  using namespace constants;
  V q = V(kExp5) * r + V(kExp4);
  q = q * r + V(kExp3);
  q = q * r + V(kExp2);
  return q * (r * r) + r + V(1.0f);
}

// log(m) for m in [sqrt(1/2), sqrt(2)] as 2 atanh((m - 1) / (m + 1)), series to t^9: 3e-9.
template <class V> CO2S_HD V log_mantissa(V m) {
  const V t = (m - V(1.0f)) / (m + V(1.0f));
  const V t2 = t * t;
  V q = V(1.0f / 9) * t2 + V(1.0f / 7);
  q = q * t2 + V(1.0f / 5);
  q = q * t2 + V(1.0f / 3);
  return V(2.0f) * (t + t * t2 * q);
}

// exp(x) for x <= 0 (at most 2 ulp; below -87 it stays at e^-87); NaN stays NaN. On a GPU two
// instructions: 2^t errs by 2 ulp, and t is rounded, which matters where exp(x) is small: in all
// 2^-22 + |x| 2^-24 of exp(x), below 2e-7 of the 1 that a softmax's sum holds.
CO2S_HD float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * constants::kLog2e));
  return y;
#else
  using namespace constants;
  x = max_keep_nan(kExpLowest, x);
  const float shifted = x * kLog2e + kRoundMagic;
  const float n = shifted - kRoundMagic;
  const float y = exp_polynomial((x - n * kLn2High) - n * kLn2Low);
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits <<= 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return y * power;
#endif
}
CO2S_HD double exp_nonpositive(double x) { return exp(x); }

// a / b for normal b up to 2^126; on a GPU within 2 ulp.
CO2S_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
#else
  return a / b;
#endif
}
CO2S_HD double quotient(double a, double b) { return a / b; }

// log(x) for normal x > 0, not infinite; NaN stays NaN.
CO2S_HD float log_positive(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t shifted = bits - 0x3f3504f3u; // sqrt(1/2): the mantissa lands in [.707, 1.414]
  const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
  bits -= static_cast<uint32_t>(exponent) << 23;
  float mantissa;
  std::memcpy(&mantissa, &bits, 4);
  const float result = static_cast<float>(exponent) * 0.693147180559945f + log_mantissa(mantissa);
  return x == x ? result : x;
#endif
}
CO2S_HD double log_positive(double x) { return log(x); }

// ---- softmax ----------------------------------------------------------------------------------

// Subtracts the maximum, which is returned; a NaN stays one.
template <class V> CO2S_HD V subtract_max(V* z, int num_classes) {
  V top = z[0];
  for (int k = 1; k < num_classes; ++k) top = larger(top, z[k]);
  for (int k = 0; k < num_classes; ++k) z[k] = z[k] - top;
  return top;
}

template <class V> CO2S_HD V sum_of(const V* e, int num_classes) {
  V sum = e[0];
  for (int k = 1; k < num_classes; ++k) sum = sum + e[k];
  return sum;
}

// Replaces z by e; returns Σ_k e_k >= 1, which is NaN when any logit is NaN or +inf.
template <class V> CO2S_HD V exponentials(V* z, int num_classes) {
  subtract_max(z, num_classes);
  for (int k = 0; k < num_classes; ++k) z[k] = exp_nonpositive(z[k]);
  return sum_of(z, num_classes);
}

// max_k softmax(z)_k = 1 / sum. `confidence >= threshold` is `threshold * sum <= 1`; the quotient
// is compared where it is needed anyway, so that it agrees with the confidence given to users.
template <class V> CO2S_HD V confidence_of(V sum) { return V(1.0f) / sum; }

template <class V> CO2S_HD bool is_confident(V sum, V threshold) { return threshold * sum <= V(1); }

// argmax with torch's rules: the lowest class among equals, the first NaN before everything.
template <class V, class I> CO2S_HD I argmax(const V* z, int num_classes) {
  V best = z[0];
  I label = I(0);
  for (int k = 1; k < num_classes; ++k) {
    const auto better = (best == best) & !(z[k] <= best);
    best = select(better, z[k], best);
    label = select(better, I(k), label);
  }
  return label;
}
// ---- cross-entropy ----------------------------------------------------------------------------

// weight * (log Σ_k e_k - (z_label - max z)).
template <class V> CO2S_HD V cross_entropy(V sum, V shifted_logit_of_label, V weight) {
  return weight * (log_positive(sum) - shifted_logit_of_label);
}

// d/dz_k of the above: weight * (softmax_k - [k == label]); scaled = weight / sum.
template <class V, class M>
CO2S_HD V cross_entropy_slope(V e, V scaled, M is_label, V weight) {
  return e * scaled - select(is_label, weight, V(0.0f));
}

// ---- stability --------------------------------------------------------------------------------

template <class M> struct Learners {
  M a, b;
};

// a learns where b is confident and no less sure than a, and the reverse; NaN teaches nobody.
template <class V> CO2S_HD auto learners(V confidence_a, V confidence_b, V threshold) {
  using M = decltype(confidence_a >= confidence_b);
  return Learners<M>{M((confidence_b >= threshold) & (confidence_b >= confidence_a)),
                     M((confidence_a >= threshold) & (confidence_a >= confidence_b))};
}

// d/dz_k of Σ_j (p_j - q_j)², q constant: 2 p_k ((p_k - q_k) - Σ_j p_j (p_j - q_j)).
template <class V> CO2S_HD V stability_slope(V p, V difference, V mean_difference) {
  return (p + p) * (difference - mean_difference);
}

// ---- which pixel counts -----------------------------------------------------------------------

// A label as the kernels keep it: the class, or one of these.
constexpr int32_t kNotTaken = -1;
constexpr int32_t kOutOfRange = -2;

// Its two halves are looked at apart: 32-bit comparisons vectorise twice as wide.
CO2S_HD int32_t checked_label(int64_t value, int32_t num_classes, int64_t ignore_index) {
  const int32_t low = static_cast<int32_t>(value), high = static_cast<int32_t>(value >> 32);
  const int32_t ignored_low = static_cast<int32_t>(ignore_index);
  const int32_t ignored_high = static_cast<int32_t>(ignore_index >> 32);
  const bool ignored = (low == ignored_low) & (high == ignored_high);
  const bool is_class = (high == 0) & (low >= 0) & (low < num_classes);
  const int32_t label = is_class ? low : kOutOfRange;
  return ignored ? kNotTaken : label;
}

// boxes [B,4] (x1, y1, x2, y2), half-open: is (y, x) taken from the partner?
CO2S_HD bool inside_box(const int32_t* box, int64_t y, int64_t x) {
  return x >= box[0] && y >= box[1] && x < box[2] && y < box[3];
}

} // namespace co2s
