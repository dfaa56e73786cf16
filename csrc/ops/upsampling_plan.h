// How one axis pair is upsampled, and into which bands of rows the work is cut.
#pragma once

#include <cstdint>
#include <vector>

namespace co2s {

// The plan as the kernels read it: pointers into an UpsamplingPlan, which has to outlive it.
template <class T> struct PlanView {
  int64_t in_height, in_width, height, width;
  bool identity;
  int64_t next_row, next_column;
  const int32_t* y_index0;
  const T *y_lower, *y_upper;
  const int32_t* x_index0;
  const T *x_lower, *x_upper;
  int64_t footprint;
  const int32_t* x_start;
  const T* x_weight;
  int64_t bands;
  const int64_t* band_begin;
};

// Everything a kernel needs to know about up(): h x w logits seen on the H x W grid. T is the
// arithmetic's type. Bands are consecutive output rows, cut only where the lower source row
// changes; they depend on the shapes alone, never on the number of threads.
template <class T> struct UpsamplingPlan {
  int64_t in_height, in_width, height, width;
  bool identity;                       // equal grids
  int64_t next_row = 1, next_column = 1; // 0 along an axis of equal lengths
  std::vector<int32_t> y_index0;       // [H], source row; the other: min(index0 + next_row, h - 1)
  std::vector<T> y_lower, y_upper;     // [H]
  std::vector<int32_t> x_index0;       // [W + padding]
  std::vector<T> x_lower, x_upper;     // [W + padding]
  // The transpose along x: cell j receives Σ_i x_weight[j * footprint + i] * g[x_start[j] + i].
  int64_t footprint = 0;
  std::vector<int32_t> x_start;        // [w]
  std::vector<T> x_weight;             // [w * footprint]
  std::vector<int64_t> band_begin;     // [bands + 1], output rows

  int64_t bands() const { return static_cast<int64_t>(band_begin.size()) - 1; }
  PlanView<T> view() const {
    return {in_height,       in_width,        height,          width,           identity,
            next_row,        next_column,     y_index0.data(), y_lower.data(),  y_upper.data(),
            x_index0.data(), x_lower.data(),  x_upper.data(),  footprint,       x_start.data(),
            x_weight.data(), bands(),         band_begin.data()};
  }
};

constexpr int64_t kRowPadding = 32; // elements readable after every row, two AVX-512 vectors

template <class T>
UpsamplingPlan<T> make_upsampling_plan(int64_t in_height, int64_t in_width, int64_t height,
                                       int64_t width, bool align_corners, bool with_transpose);

extern template UpsamplingPlan<float> make_upsampling_plan(int64_t, int64_t, int64_t, int64_t,
                                                           bool, bool);
extern template UpsamplingPlan<double> make_upsampling_plan(int64_t, int64_t, int64_t, int64_t,
                                                            bool, bool);

} // namespace co2s
