// UpsamplingPlan: bands cover every row once, and the transpose is the transpose.
#include "ops/upsampling_plan.h"

#include "check.h"

using namespace co2s;

namespace {

void test_bands(const UpsamplingPlan<float>& plan) {
  CHECK(plan.band_begin.front() == 0 && plan.band_begin.back() == plan.height);
  for (int64_t band = 1; band < plan.bands(); ++band) {
    const int64_t y = plan.band_begin[band];
    CHECK(y > plan.band_begin[band - 1]);
    if (!plan.identity) CHECK(plan.y_index0[y] != plan.y_index0[y - 1]);
  }
}

void test_transpose(const UpsamplingPlan<float>& plan) {
  // <up(e_j), g> computed both ways for g = a ramp.
  for (int64_t j = 0; j < plan.in_width; ++j) {
    double forward = 0, backward = 0;
    for (int64_t x = 0; x < plan.width; ++x) {
      const int64_t low = plan.x_index0[x], high = low + (low < plan.in_width - 1);
      if (low == j) forward += double(plan.x_lower[x]) * (x + 1);
      if (high == j) forward += double(plan.x_upper[x]) * (x + 1);
    }
    for (int64_t i = 0; i < plan.footprint; ++i) {
      const float weight = plan.x_weight[j * plan.footprint + i];
      if (weight != 0) CHECK(plan.x_start[j] + i < plan.width);
      backward += double(weight) * (plan.x_start[j] + i + 1);
    }
    CHECK_NEAR(backward, forward, 1e-6 * (1 + forward));
  }
}

} // namespace

int main() {
  const int64_t sizes[][2] = {{128, 512}, {129, 512}, {7, 20}, {31, 17}, {1, 40}, {40, 1}, {64, 65}};
  for (const auto& [in, out] : sizes) {
    for (bool align : {false, true}) {
      const auto plan = make_upsampling_plan<float>(in, in, out, out, align, true);
      test_bands(plan);
      if (!plan.identity) test_transpose(plan);
    }
  }
  const auto identity = make_upsampling_plan<float>(300, 200, 300, 200, false, true);
  CHECK(identity.identity && identity.footprint == 0);
  test_bands(identity);
  return co2s_test::finish("plan");
}
