// Rows of any dtype and stride, read into and written from rows of the arithmetic's type.
#pragma once

#include <cstdlib>
#include <new>

#include "ops/cpu/simd.h"
#include "ops/views.h"

namespace co2s::CO2S_ISA {
namespace {

// Aligned memory of one thread, zero at first. No std::vector here: its functions are shared
// between translation units, and the linker could take those of the wrong instruction set.
template <class T> class Buffer {
public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

private:
  T* data_;
};

CO2S_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
CO2S_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

CO2S_INLINE float widen(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }
CO2S_INLINE float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // The exponent is rebiased by a multiplication, which also makes subnormals right.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if ((x.bits & 0x7c00u) == 0x7c00u) return float_from_bits(sign | 0x7f800000u | magnitude);
  const float scaled = float_from_bits(magnitude) * 0x1p112f;
  return float_from_bits(sign | bits_of(scaled));
#endif
}
CO2S_INLINE float widen(float x) { return x; }
CO2S_INLINE double widen(double x) { return x; }

CO2S_INLINE void narrow(float x, float* to) { *to = x; }
CO2S_INLINE void narrow(double x, double* to) { *to = x; }
CO2S_INLINE void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}
CO2S_INLINE void narrow(float x, Half* to) {
#if defined(__F16C__)
  to->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u; // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u; // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal in half: adding 0.5 puts its last bit where float rounds.
    result = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | result);
#endif
}

template <class S, class T>
CO2S_INLINE void read_row_as(const void* data, int64_t offset, int64_t stride, int64_t count,
                             T* to) {
  const S* from = static_cast<const S*>(data) + offset;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i * stride]));
  }
}

// One row of floating-point elements, converted to T.
template <class T>
void read_row(const void* data, Dtype dtype, int64_t offset, int64_t stride, int64_t count, T* to) {
  switch (dtype) {
  case Dtype::kFloat64: read_row_as<double>(data, offset, stride, count, to); break;
  case Dtype::kFloat16: read_row_as<Half>(data, offset, stride, count, to); break;
  case Dtype::kBFloat16: read_row_as<BFloat16>(data, offset, stride, count, to); break;
  default: read_row_as<float>(data, offset, stride, count, to);
  }
}

template <class S, class T>
CO2S_INLINE void write_row_as(const T* from, int64_t count, void* data, int64_t offset) {
  S* to = static_cast<S*>(data) + offset;
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to + i);
}

// One contiguous row of T, rounded to `dtype`.
template <class T>
void write_row(const T* from, int64_t count, void* data, Dtype dtype, int64_t offset) {
  if constexpr (sizeof(T) == 8) {
    write_row_as<double>(from, count, data, offset);
  } else {
    switch (dtype) {
    case Dtype::kFloat16: write_row_as<Half>(from, count, data, offset); break;
    case Dtype::kBFloat16: write_row_as<BFloat16>(from, count, data, offset); break;
    default: write_row_as<float>(from, count, data, offset);
    }
  }
}

} // namespace
} // namespace co2s::CO2S_ISA
