// Reading logits: in vectors of pixels on equal grids, or one column of upsampled pixels.
//
// N classes are kept in registers, in arrays that only unrolled loops index; classes from K to N
// are -inf, which no maximum and no sum of exponentials notices. N = 0: any number of classes,
// read again in each pass.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

#include "ops/cuda/device.cuh"
#include "ops/cuda/online_softmax.h"

namespace co2s::cuda {

template <class S> using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Calls f(S{}, std::integral_constant<int, N>{}) for the logits' dtype and number of registers.
// float64 is for checks, not for training: it always reads in passes.
template <class T, class F> void with_kernel(Dtype dtype, int registers, F f) {
  const auto with_registers = [&](auto storage) {
    switch (registers) {
    case 6: f(storage, std::integral_constant<int, 6>{}); break;
    case 8: f(storage, std::integral_constant<int, 8>{}); break;
    case 16: f(storage, std::integral_constant<int, 16>{}); break;
    case 32: f(storage, std::integral_constant<int, 32>{}); break;
    default: f(storage, std::integral_constant<int, 0>{});
    }
  };
  if constexpr (std::is_same_v<T, double>) {
    f(double{}, std::integral_constant<int, 0>{});
  } else {
    switch (dtype) {
    case Dtype::kFloat16: with_registers(c10::Half{}); break;
    case Dtype::kBFloat16: with_registers(c10::BFloat16{}); break;
    default: with_registers(float{});
    }
  }
}

template <class T> __device__ __forceinline__ T minus_infinity() { return -T(INFINITY); }

// low * low_weight + high * high_weight, rounded alike everywhere: two students whose logits are
// equal must stay equal, in the backward as in the forward.
__device__ __forceinline__ float blend(float low, float high, float low_weight, float high_weight) {
  return fmaf(high, high_weight, low * low_weight);
}
__device__ __forceinline__ double blend(double low, double high, double low_weight,
                                        double high_weight) {
  return fma(high, high_weight, low * low_weight);
}

template <class S>
__device__ __forceinline__ const S* image_of(const LogitsView& logits, int64_t image) {
  return static_cast<const S*>(logits.data) + image * logits.stride_b;
}

// ---- equal grids ------------------------------------------------------------------------------

// V values that are read or written at once.
template <class S, int V> struct alignas(sizeof(S) * V) Pack {
  S value[V];
};

template <class S, int N, int Students>
constexpr int kVectorLength =
    N == 0 ? 1 : vector_bytes(N, Students, sizeof(S)) / static_cast<int>(sizeof(S));

// Where a thread's vector of pixels lies.
struct VectorPosition {
  int64_t image;
  int32_t pixel, y, x; // of its first pixel
  bool inside;
};

template <class T>
__device__ __forceinline__ VectorPosition vector_position(const Grid<T>& grid,
                                                          const PixelBlocks& blocks, int length) {
  VectorPosition at;
  const int32_t block = static_cast<int32_t>(blockIdx.x), image = block / blocks.an_image;
  at.image = image;
  const int64_t vector =
      static_cast<int64_t>(block - image * blocks.an_image) * kThreads + threadIdx.x;
  at.inside = vector * length < static_cast<int64_t>(grid.y.out) * grid.x.out;
  at.pixel = at.inside ? static_cast<int32_t>(vector * length) : 0;
  at.y = at.pixel / grid.x.out;
  at.x = at.pixel - at.y * grid.x.out;
  return at;
}

// All classes of V pixels that follow each other.
template <class S, int N, int V> struct Vectors {
  Pack<S, V> pack[N];

  __device__ __forceinline__ void load(const LogitsView& logits, const VectorPosition& at) {
    const S* from = image_of<S>(logits, at.image) + at.pixel;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < logits.classes) {
        pack[k] = *reinterpret_cast<const Pack<S, V>*>(from + k * logits.stride_k);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) pack[k].value[v] = static_cast<S>(-INFINITY);
      }
    }
  }

  template <class T> __device__ __forceinline__ void get(int v, T (&z)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] = static_cast<T>(pack[k].value[v]);
  }

  template <class T> __device__ __forceinline__ void put(int v, const T (&gradient)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) pack[k].value[v] = static_cast<S>(gradient[k]);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) pack[k].value[v] = static_cast<S>(0.0f);
    }
  }

  // To a contiguous [B,K,H,W].
  __device__ __forceinline__ void store(void* gradient, const LogitsView& logits,
                                        const VectorPosition& at) const {
    const int64_t plane = logits.height * logits.width;
    S* to = static_cast<S*>(gradient) + at.image * logits.classes * plane + at.pixel;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < logits.classes) *reinterpret_cast<Pack<S, V>*>(to + k * plane) = pack[k];
    }
  }
};

// One pixel's logits, read when asked for.
template <class S> struct StridedLogits {
  const S* from;
  int64_t stride_k;

  __device__ __forceinline__ StridedLogits(const LogitsView& logits, int64_t image, int64_t y,
                                           int64_t x)
      : from(image_of<S>(logits, image) + y * logits.stride_y + x * logits.stride_x),
        stride_k(logits.stride_k) {}

  __device__ __forceinline__ Wide<S> operator()(int64_t k) const {
    return static_cast<Wide<S>>(from[k * stride_k]);
  }
};

// V values of the dtype T to contiguous memory.
template <int V, class T> __device__ __forceinline__ void store_vector(T* to, const T (&value)[V]) {
  constexpr int kAtOnce = V * sizeof(T) > 16 ? 16 / static_cast<int>(sizeof(T)) : V;
#pragma unroll
  for (int begin = 0; begin < V; begin += kAtOnce) {
    Pack<T, kAtOnce> pack;
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) pack.value[v] = value[begin + v];
    *reinterpret_cast<Pack<T, kAtOnce>*>(to + begin) = pack;
  }
}

// ---- upsampling -------------------------------------------------------------------------------

// Where a thread's column of pixels lies.
struct ColumnPosition {
  int64_t image;
  int32_t x, y, y_end;
};

template <class T>
__device__ __forceinline__ ColumnPosition column_position(const Grid<T>& grid,
                                                          const PixelBlocks& blocks) {
  ColumnPosition at;
  const int32_t image = static_cast<int32_t>(blockIdx.x) / blocks.an_image;
  const int32_t block = static_cast<int32_t>(blockIdx.x) - image * blocks.an_image;
  const int32_t row = block / blocks.a_row;
  at.image = image;
  at.x = (block - row * blocks.a_row) * kColumns + static_cast<int32_t>(threadIdx.x);
  at.y = (row * (kThreads / kColumns) + static_cast<int32_t>(threadIdx.y)) * kRowsPerThread;
  at.y_end = at.x < grid.x.out ? smaller(at.y + kRowsPerThread, grid.y.out) : at.y;
  return at;
}

// A column of pixels: the two rows of cells around the current pixel, blended along x.
template <class S, int N> struct Column {
  using T = Wide<S>;

  // Classes `first` to `first` + `count` of the image.
  __device__ __forceinline__ void start(const LogitsView& logits, int64_t image,
                                        const Tap<T, int32_t>& x, int32_t first, int32_t count) {
    const S* from = image_of<S>(logits, image) + first * logits.stride_k;
    left_ = from + x.index0 * logits.stride_x;
    right_ = x.index1 > x.index0 ? logits.stride_x : 0;
    weight_left_ = x.lower;
    weight_right_ = x.upper;
    stride_k_ = logits.stride_k;
    stride_y_ = logits.stride_y;
    last_ = static_cast<int32_t>(logits.height) - 1;
    count_ = count;
    row_ = -2;
  }

  // The pixels of `row` read this row of cells and the next one.
  __device__ __forceinline__ void seek(int32_t row) {
    if (row == row_) return;
    if (row == row_ + 1) {
#pragma unroll
      for (int k = 0; k < N; ++k) upper_[k] = lower_[k];
    } else {
      load(row, upper_);
    }
    load(smaller(row + 1, last_), lower_);
    row_ = row;
  }

  __device__ __forceinline__ void get(const Tap<T, int32_t>& y, T (&z)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] = blend(upper_[k], lower_[k], y.lower, y.upper);
    if (count_ == N) return; // mostly; else a comparison for every class
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] = k < count_ ? z[k] : minus_infinity<T>();
  }

private:
  // Two loops, because a comparison for every class costs as much as its arithmetic.
  __device__ __forceinline__ void load(int32_t row, T (&cells)[N]) const {
    const S *left = left_ + row * stride_y_, *right = left + right_;
    if (count_ == N) {
#pragma unroll
      for (int k = 0; k < N; ++k) cells[k] = cell(left[k * stride_k_], right[k * stride_k_]);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        cells[k] = k < count_ ? cell(left[k * stride_k_], right[k * stride_k_]) : T(0);
      }
    }
  }

  __device__ __forceinline__ T cell(S left, S right) const {
    return blend(static_cast<T>(left), static_cast<T>(right), weight_left_, weight_right_);
  }

  const S* left_;
  T weight_left_, weight_right_;
  int64_t right_, stride_k_, stride_y_; // right: from the left cell to the right one
  int32_t last_, count_, row_;
  T upper_[N], lower_[N];
};

template <class S> struct Column<S, 0> {}; // BlendedLogits instead

// One upsampled pixel's logits, blended when asked for, by the same arithmetic as Column.
template <class S> struct BlendedLogits {
  using T = Wide<S>;

  __device__ __forceinline__ BlendedLogits(const LogitsView& logits, int64_t image,
                                           const Tap<T, int32_t>& y, const Tap<T, int32_t>& x)
      : upper(image_of<S>(logits, image) + y.index0 * logits.stride_y),
        lower(image_of<S>(logits, image) + y.index1 * logits.stride_y),
        left(x.index0 * logits.stride_x), right(x.index1 * logits.stride_x),
        stride_k(logits.stride_k), weight_x{x.lower, x.upper}, weight_y{y.lower, y.upper} {}

  __device__ __forceinline__ T operator()(int64_t k) const {
    const int64_t offset = k * stride_k;
    const T top = blend(static_cast<T>(upper[offset + left]), static_cast<T>(upper[offset + right]),
                        weight_x[0], weight_x[1]);
    const T bottom = blend(static_cast<T>(lower[offset + left]),
                           static_cast<T>(lower[offset + right]), weight_x[0], weight_x[1]);
    return blend(top, bottom, weight_y[0], weight_y[1]);
  }

  const S *upper, *lower;
  int64_t left, right, stride_k;
  T weight_x[2], weight_y[2];
};

// ---- softmax in passes ------------------------------------------------------------------------

// Of logits z(k); `of_label` becomes z(label).
template <class T, class Z>
__device__ __forceinline__ OnlineSoftmax<T> softmax_in_a_pass(const Z& z, int32_t classes,
                                                             int32_t label, T* of_label) {
  const T first = z(0);
  *of_label = first;
  OnlineSoftmax<T> state = begin_softmax(first);
#pragma unroll 4
  for (int32_t k = 1; k < classes; ++k) {
    const T value = z(k);
    *of_label = k == label ? value : *of_label;
    add_logit(state, value);
  }
  return finished(state);
}

} // namespace co2s::cuda
