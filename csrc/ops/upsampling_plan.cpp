#include "ops/upsampling_plan.h"

#include <algorithm>

#include "pixel_math.h"

namespace co2s {
namespace {

constexpr int64_t kPixelsPerBand = 16384; // about 100 microseconds of work
constexpr int64_t kFootprintUnit = 16;    // floats in the widest vector

template <class T>
void fill_transpose(UpsamplingPlan<T>& plan, const std::vector<Tap<T>>& taps) {
  const int64_t w = plan.in_width;
  std::vector<int32_t> end(w, 0);
  plan.x_start.assign(w, static_cast<int32_t>(plan.width));
  for (int64_t x = 0; x < plan.width; ++x) {
    for (int64_t j : {taps[x].index0, taps[x].index1}) {
      plan.x_start[j] = std::min<int32_t>(plan.x_start[j], x);
      end[j] = std::max<int32_t>(end[j], x + 1);
    }
  }
  int64_t widest = 0;
  for (int64_t j = 0; j < w; ++j) widest = std::max<int64_t>(widest, end[j] - plan.x_start[j]);
  // Vectors of 8 when one is enough (4x upsampling), else whole multiples of 16.
  plan.footprint = widest <= 8 ? 8 : (widest + kFootprintUnit - 1) / kFootprintUnit * kFootprintUnit;
  plan.x_weight.assign(w * plan.footprint, T(0));
  for (int64_t j = 0; j < w; ++j) {
    if (end[j] == 0) plan.x_start[j] = 0; // downsampling: nobody reads this cell
  }
  for (int64_t x = 0; x < plan.width; ++x) {
    const Tap<T>& tap = taps[x];
    plan.x_weight[tap.index0 * plan.footprint + x - plan.x_start[tap.index0]] += tap.lower;
    plan.x_weight[tap.index1 * plan.footprint + x - plan.x_start[tap.index1]] += tap.upper;
  }
}

template <class T> void fill_axes(UpsamplingPlan<T>& plan, bool align_corners, bool transpose) {
  // A neighbour of weight 0 would still pass its NaN on; nor does F.interpolate read it on a CPU.
  plan.next_row = plan.in_height == plan.height ? 0 : 1;
  plan.next_column = plan.in_width == plan.width ? 0 : 1;
  const T scale_y = interpolation_scale<T>(plan.in_height, plan.height, align_corners);
  for (int64_t y = 0; y < plan.height; ++y) {
    const auto tap = interpolation_tap<T>(y, plan.in_height, scale_y, align_corners);
    plan.y_index0.push_back(static_cast<int32_t>(tap.index0));
    plan.y_lower.push_back(tap.lower);
    plan.y_upper.push_back(tap.upper);
  }
  const T scale_x = interpolation_scale<T>(plan.in_width, plan.width, align_corners);
  std::vector<Tap<T>> taps;
  for (int64_t x = 0; x < plan.width; ++x) {
    taps.push_back(interpolation_tap<T>(x, plan.in_width, scale_x, align_corners));
    if (plan.next_column == 0) taps.back().index1 = taps.back().index0;
  }
  for (int64_t x = 0; x < plan.width + kRowPadding; ++x) {
    const Tap<T>& tap = taps[std::min(x, plan.width - 1)];
    plan.x_index0.push_back(static_cast<int32_t>(tap.index0));
    plan.x_lower.push_back(tap.lower);
    plan.x_upper.push_back(tap.upper);
  }
  if (transpose) fill_transpose(plan, taps);
}

template <class T> void cut_bands(UpsamplingPlan<T>& plan) {
  const int64_t rows = std::max<int64_t>(1, kPixelsPerBand / std::max<int64_t>(1, plan.width));
  plan.band_begin.push_back(0);
  for (int64_t y = 1; y < plan.height; ++y) {
    const bool may_cut = plan.identity || plan.y_index0[y] != plan.y_index0[y - 1];
    if (may_cut && y - plan.band_begin.back() >= rows) plan.band_begin.push_back(y);
  }
  plan.band_begin.push_back(plan.height);
}

} // namespace

template <class T>
UpsamplingPlan<T> make_upsampling_plan(int64_t in_height, int64_t in_width, int64_t height,
                                       int64_t width, bool align_corners, bool with_transpose) {
  UpsamplingPlan<T> plan;
  plan.in_height = in_height;
  plan.in_width = in_width;
  plan.height = height;
  plan.width = width;
  plan.identity = in_height == height && in_width == width;
  if (!plan.identity) fill_axes(plan, align_corners, with_transpose);
  cut_bands(plan);
  return plan;
}

template UpsamplingPlan<float> make_upsampling_plan(int64_t, int64_t, int64_t, int64_t, bool, bool);
template UpsamplingPlan<double> make_upsampling_plan(int64_t, int64_t, int64_t, int64_t, bool,
                                                     bool);

} // namespace co2s
