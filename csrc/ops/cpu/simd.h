// Vectors of pixels: Vec<T> has as many lanes as the instruction set this file is compiled for.
//
// Everything is in an unnamed namespace: the same source is compiled once per instruction set, and
// the linker must never take a function from the wrong one.
#pragma once

#include "pixel_math.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace co2s::CO2S_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define CO2S_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

template <class T> struct Lane;
template <> struct Lane<float> {
  using Int = int32_t;
  typedef float Raw __attribute__((vector_size(kVectorBytes)));
  typedef int32_t RawInt __attribute__((vector_size(kVectorBytes)));
};
template <> struct Lane<double> {
  using Int = int64_t;
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef int64_t RawInt __attribute__((vector_size(kVectorBytes)));
};

// A mask or a vector of integers as wide as T.
template <class T> struct IntVec {
  using Raw = typename Lane<T>::RawInt;
  Raw v;
  IntVec() = default;
  CO2S_INLINE IntVec make(Raw raw) { return IntVec(raw, 0); }
  explicit inline __attribute__((always_inline)) IntVec(int value) : v(Raw{} + value) {}
  inline __attribute__((always_inline)) IntVec(Raw raw, int) : v(raw) {}
};

template <class T> struct Vec {
  using Raw = typename Lane<T>::Raw;
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  Raw v;
  Vec() = default;
  explicit inline __attribute__((always_inline)) Vec(T value) : v(Raw{} + value) {}
  inline __attribute__((always_inline)) Vec(Raw raw, int) : v(raw) {}
};

#define CO2S_BINARY(op)                                                                            \
  template <class T> CO2S_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) {                          \
    return Vec<T>(a.v op b.v, 0);                                                                  \
  }
CO2S_BINARY(+) CO2S_BINARY(-) CO2S_BINARY(*) CO2S_BINARY(/)
#undef CO2S_BINARY
#define CO2S_COMPARE(op)                                                                           \
  template <class T> CO2S_INLINE IntVec<T> operator op(Vec<T> a, Vec<T> b) {                       \
    return IntVec<T>::make(a.v op b.v);                                                            \
  }                                                                                                \
  template <class T> CO2S_INLINE IntVec<T> operator op(IntVec<T> a, IntVec<T> b) {                 \
    return IntVec<T>::make(a.v op b.v);                                                            \
  }
CO2S_COMPARE(==) CO2S_COMPARE(<=) CO2S_COMPARE(>=) CO2S_COMPARE(>)
#undef CO2S_COMPARE
template <class T> CO2S_INLINE IntVec<T> operator&(IntVec<T> a, IntVec<T> b) {
  return IntVec<T>::make(a.v & b.v);
}
template <class T> CO2S_INLINE IntVec<T> operator|(IntVec<T> a, IntVec<T> b) {
  return IntVec<T>::make(a.v | b.v);
}
template <class T> CO2S_INLINE IntVec<T> operator!(IntVec<T> mask) {
  return IntVec<T>::make(~mask.v);
}

template <class T> CO2S_INLINE Vec<T> load(const T* from) {
  Vec<T> x;
  std::memcpy(&x.v, from, kVectorBytes);
  return x;
}
template <class T> CO2S_INLINE Vec<T> load_partial(const T* from, int64_t count) {
  T lanes[Vec<T>::kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}
template <class T> CO2S_INLINE void store(T* to, Vec<T> x) { std::memcpy(to, &x.v, kVectorBytes); }
// As store, past the caches, for what nobody reads soon; `to` is aligned to the vector.
template <class T> CO2S_INLINE void store_past_cache(T* to, Vec<T> x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)x.v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)x.v);
#else
  store(to, x);
#endif
}
// Makes such stores visible to other threads.
CO2S_INLINE void fence_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
template <class T> CO2S_INLINE void store_partial(T* to, Vec<T> x, int64_t count) {
  std::memcpy(to, &x.v, count * sizeof(T));
}

// As many int32 as T has lanes.
template <class T> CO2S_INLINE IntVec<T> load_int(const int32_t* from) {
  if constexpr (sizeof(T) == 4) {
    IntVec<T> x;
    std::memcpy(&x.v, from, kVectorBytes);
    return x;
  } else {
    typedef int32_t Half __attribute__((vector_size(kVectorBytes / 2)));
    Half half;
    std::memcpy(&half, from, kVectorBytes / 2);
    return IntVec<T>::make(__builtin_convertvector(half, typename IntVec<T>::Raw));
  }
}

template <class T> CO2S_INLINE Vec<T> select(IntVec<T> mask, Vec<T> a, Vec<T> b) {
  return Vec<T>(mask.v ? a.v : b.v, 0);
}
template <class T> CO2S_INLINE IntVec<T> select(IntVec<T> mask, IntVec<T> a, IntVec<T> b) {
  return IntVec<T>::make(mask.v ? a.v : b.v);
}
// x where the mask is set, else +0, whatever x holds there.
template <class T> CO2S_INLINE Vec<T> keep(IntVec<T> mask, Vec<T> x) {
  return Vec<T>((typename Vec<T>::Raw)((typename IntVec<T>::Raw)x.v & mask.v), 0);
}

CO2S_INLINE Vec<float> max_keep_nan(Vec<float> bound, Vec<float> x) {
#if defined(__AVX512F__)
  return Vec<float>((Vec<float>::Raw)_mm512_max_ps((__m512)bound.v, (__m512)x.v), 0);
#elif defined(__AVX2__)
  return Vec<float>((Vec<float>::Raw)_mm256_max_ps((__m256)bound.v, (__m256)x.v), 0);
#elif defined(__SSE2__)
  return Vec<float>((Vec<float>::Raw)_mm_max_ps((__m128)bound.v, (__m128)x.v), 0);
#else
  return Vec<float>(bound.v > x.v ? bound.v : x.v, 0);
#endif
}
CO2S_INLINE Vec<double> max_keep_nan(Vec<double> bound, Vec<double> x) {
  return Vec<double>(bound.v > x.v ? bound.v : x.v, 0);
}

template <class T> CO2S_INLINE bool any(IntVec<T> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask.v, (__m512i)mask.v) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask.v, (__m256i)mask.v);
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask.v) != 0;
#else
  typename Lane<T>::Int all = 0;
  for (int i = 0; i < Vec<T>::kLanes; ++i) all |= mask.v[i];
  return all != 0;
#endif
}
template <class T> CO2S_INLINE int count(IntVec<T> mask) {
  int total = 0;
  for (int i = 0; i < Vec<T>::kLanes; ++i) total -= static_cast<int>(mask.v[i]);
  return total;
}
template <class T> CO2S_INLINE double sum_lanes(Vec<T> x) {
  double total = 0;
  for (int i = 0; i < Vec<T>::kLanes; ++i) total += static_cast<double>(x.v[i]);
  return total;
}
template <class T> CO2S_INLINE T add_lanes(Vec<T> x) {
  T lanes[Vec<T>::kLanes];
  store(lanes, x);
  for (int half = Vec<T>::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}
#if defined(__AVX2__) && !defined(__AVX512F__)
CO2S_INLINE float add_lanes(Vec<float> x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x.v),
                           _mm256_extractf128_ps((__m256)x.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

#if defined(__AVX2__)
// to[i] = Σ_t rows[start[i] + t] * weight[i * count + t] for eight i; count is a multiple of 8.
CO2S_INLINE void eight_dots(const float* rows, const int32_t* start, const float* weight,
                            int64_t count, float* to) {
  __m256 sum[8]; // in registers: every loop over it is unrolled
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    sum[i] = _mm256_mul_ps(_mm256_loadu_ps(rows + start[i]), _mm256_loadu_ps(weight + i * count));
  }
  for (int64_t t = 8; t < count; t += 8) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      sum[i] = _mm256_fmadd_ps(_mm256_loadu_ps(rows + start[i] + t),
                               _mm256_loadu_ps(weight + i * count + t), sum[i]);
    }
  }
  // Pairwise sums within each half of eight vectors, then the halves.
  const __m256 s01 = _mm256_hadd_ps(sum[0], sum[1]), s23 = _mm256_hadd_ps(sum[2], sum[3]);
  const __m256 s45 = _mm256_hadd_ps(sum[4], sum[5]), s67 = _mm256_hadd_ps(sum[6], sum[7]);
  const __m256 s03 = _mm256_hadd_ps(s01, s23), s47 = _mm256_hadd_ps(s45, s67);
  const __m256 low = _mm256_permute2f128_ps(s03, s47, 0x20);
  const __m256 high = _mm256_permute2f128_ps(s03, s47, 0x31);
  _mm256_storeu_ps(to, _mm256_add_ps(low, high));
}
#endif

// from[offset[lane]]; offsets relative to `from`, in [0, kLanes) when `near`.
template <class T> CO2S_INLINE Vec<T> take(const T* from, IntVec<T> offset, bool near) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    if (near) {
      return Vec<T>((typename Vec<T>::Raw)_mm512_permutexvar_ps((__m512i)offset.v,
                                                                (__m512)load(from).v), 0);
    }
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    if (near) {
      return Vec<T>((typename Vec<T>::Raw)_mm256_permutevar8x32_ps((__m256)load(from).v,
                                                                   (__m256i)offset.v), 0);
    }
  }
#endif
  (void)near;
  Vec<T> x;
  for (int i = 0; i < Vec<T>::kLanes; ++i) x.v[i] = from[offset.v[i]];
  return x;
}

CO2S_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  using namespace constants;
  using V = Vec<float>;
  x = max_keep_nan(V(kExpLowest), x);
  const V shifted = x * V(kLog2e) + V(kRoundMagic);
  const V n = shifted - V(kRoundMagic);
  const V y = exp_polynomial((x - n * V(kLn2High)) - n * V(kLn2Low));
  return y * V((V::Raw)((IntVec<float>::Raw)shifted.v << 23), 0);
}
CO2S_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = ::exp(x.v[i]);
  return x;
}

CO2S_INLINE Vec<float> log_positive(Vec<float> x) {
  using V = Vec<float>;
  using I = IntVec<float>::Raw;
  const I shifted = (I)x.v - 0x3f3504f3;
  const I exponent = shifted >> 23;
  const V mantissa((V::Raw)((I)x.v - (exponent << 23)), 0);
  const V result = V(__builtin_convertvector(exponent, V::Raw), 0) * V(0.693147180559945f) +
                   log_mantissa(mantissa);
  return select(x == x, result, x);
}
CO2S_INLINE Vec<double> log_positive(Vec<double> x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = ::log(x.v[i]);
  return x;
}

} // namespace
} // namespace co2s::CO2S_ISA
