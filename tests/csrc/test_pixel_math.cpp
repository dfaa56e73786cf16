// The arithmetic of pixel_math.h on scalars, against the C library in double.
#include "pixel_math.h"

#include <algorithm>
#include <limits>

#include "check.h"

using namespace co2s;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

double relative_ulps(float found, double expected) {
  return std::fabs(found - expected) / (std::fabs(expected) * std::numeric_limits<float>::epsilon());
}

void test_exp() {
  double worst = 0;
  for (float x = -87.0f; x <= 0.0f; x += 1.0f / 1024) {
    worst = std::max(worst, relative_ulps(exp_nonpositive(x), std::exp(double(x))));
  }
  CHECK(worst <= 2.0);
  CHECK(exp_nonpositive(0.0f) == 1.0f);
  CHECK(exp_nonpositive(-1e30f) >= 0.0f && exp_nonpositive(-1e30f) < 2e-38f);
  CHECK(exp_nonpositive(-kInf) < 2e-38f);
  CHECK(std::isnan(exp_nonpositive(kNan)));
  float odd_nan; // every payload bit set
  const uint32_t bits = 0xffffffffu;
  std::memcpy(&odd_nan, &bits, 4);
  CHECK(std::isnan(exp_nonpositive(odd_nan)));
}

void test_log() {
  double worst = 0;
  for (float x = 1.0f; x < 300.0f; x *= 1.0003f) {
    const double expected = std::log(double(x));
    worst = std::max(worst, std::fabs(log_positive(x) - expected) / std::max(expected, 0.1));
  }
  CHECK(worst <= 3e-7);
  CHECK(log_positive(1.0f) == 0.0f);
  CHECK_NEAR(log_positive(1.0000001f), std::log(1.0 + 0x1p-23), 1e-14);
  CHECK_NEAR(log_positive(1e-30f), std::log(1e-30), 1e-5);
  CHECK(std::isnan(log_positive(kNan)));
}

void test_interpolation() {
  // 4 -> 16 cells, align_corners off: (i + 0.5) / 4 - 0.5, clamped at 0.
  const float scale = interpolation_scale<float>(4, 16, false);
  const auto first = interpolation_tap<float>(0, 4, scale, false);
  CHECK(first.index0 == 0 && first.index1 == 1 && first.upper == 0.0f);
  const auto middle = interpolation_tap<float>(6, 4, scale, false); // 6.5 / 4 - 0.5 = 1.125
  CHECK(middle.index0 == 1 && middle.index1 == 2);
  CHECK(middle.upper == 0.125f && middle.lower == 0.875f);
  const auto last = interpolation_tap<float>(15, 4, scale, false);
  CHECK(last.index0 == 3 && last.index1 == 3); // 3.375, no neighbour above
  // 5 -> 9 cells, align_corners on: i / 2.
  const float aligned = interpolation_scale<float>(5, 9, true);
  CHECK(aligned == 0.5f);
  const auto odd = interpolation_tap<float>(3, 5, aligned, true);
  CHECK(odd.index0 == 1 && odd.index1 == 2 && odd.upper == 0.5f);
  const auto end = interpolation_tap<float>(8, 5, aligned, true);
  CHECK(end.index0 == 4 && end.index1 == 4 && end.upper == 0.0f);
  CHECK(interpolation_scale<float>(5, 1, true) == 0.0f); // one output: the first input
  // Rounding of the source index must never leave the input.
  for (int64_t out = 1; out < 700; out += 7) {
    for (int64_t in = 1; in < 60; in += 3) {
      for (bool align : {false, true}) {
        const float s = interpolation_scale<float>(in, out, align);
        for (int64_t i = 0; i < out; ++i) {
          const auto tap = interpolation_tap<float>(i, in, s, align);
          CHECK(tap.index0 >= 0 && tap.index1 < in && tap.index1 - tap.index0 <= 1);
          CHECK(tap.upper >= 0.0f && tap.upper <= 1.0f);
        }
      }
    }
  }
}

template <class T> void test_softmax(double tolerance) {
  const double logits[] = {1.5, -2.0, 3.25, 3.0, -50.0};
  T z[5];
  double expected = 0;
  for (int k = 0; k < 5; ++k) {
    z[k] = static_cast<T>(logits[k]);
    expected += std::exp(logits[k] - 3.25);
  }
  CHECK((argmax<T, int32_t>(z, 5)) == 2);
  const T sum = exponentials(z, 5);
  CHECK_NEAR(sum, expected, tolerance);
  CHECK_NEAR(confidence_of(sum), 1 / expected, tolerance);
  CHECK(is_confident(sum, static_cast<T>(0.99 / expected)));
  CHECK(!is_confident(sum, static_cast<T>(1.01 / expected)));
}

void test_softmax_edges() {
  float ties[] = {1.0f, 2.0f, 2.0f};
  CHECK((argmax<float, int32_t>(ties, 3)) == 1);
  float with_nan[] = {5.0f, kNan, 9.0f};
  CHECK((argmax<float, int32_t>(with_nan, 3)) == 1);
  CHECK(std::isnan(exponentials(with_nan, 3)));
  CHECK(!is_confident(kNan, 0.0f));
  float masked[] = {-kInf, 0.0f};
  CHECK_NEAR(exponentials(masked, 2), 1.0, 1e-7);
  float nothing[] = {-kInf, -kInf};
  CHECK(std::isnan(exponentials(nothing, 2)));
  float single[] = {-7.0f};
  CHECK(exponentials(single, 1) == 1.0f);
}

double cross_entropy_of(const double* logits, int label) {
  double z[4];
  std::copy(logits, logits + 4, z);
  double shifted[4];
  std::copy(logits, logits + 4, shifted);
  subtract_max(shifted, 4);
  return cross_entropy(exponentials(z, 4), shifted[label], 0.7);
}

void test_cross_entropy() {
  const double logits[] = {0.3, -1.2, 2.0, 0.1};
  double sum = 0;
  for (double z : logits) sum += std::exp(z);
  CHECK_NEAR(cross_entropy_of(logits, 1), 0.7 * (std::log(sum) + 1.2), 1e-14);
  double e[4];
  std::copy(logits, logits + 4, e);
  const double total = exponentials(e, 4);
  for (int k = 0; k < 4; ++k) {
    double up[4], down[4];
    std::copy(logits, logits + 4, up);
    std::copy(logits, logits + 4, down);
    up[k] += 1e-6;
    down[k] -= 1e-6;
    const double slope = (cross_entropy_of(up, 1) - cross_entropy_of(down, 1)) / 2e-6;
    CHECK_NEAR(cross_entropy_slope(e[k], 0.7 / total, k == 1, 0.7), slope, 1e-9);
  }
}

void test_learners() {
  const auto equal = learners(0.97, 0.97, 0.95);
  CHECK(equal.a && equal.b); // equal and confident: both learn
  const auto b_teaches = learners(0.5, 0.96, 0.95);
  CHECK(b_teaches.a && !b_teaches.b);
  const auto both_confident = learners(0.99, 0.96, 0.95);
  CHECK(!both_confident.a && both_confident.b);
  const auto nobody = learners(0.94, 0.5, 0.95);
  CHECK(!nobody.a && !nobody.b);
  const auto nan = learners(static_cast<double>(kNan), 0.99, 0.95);
  CHECK(!nan.a && !nan.b);
}

double squared_distance(const double* logits, const double* q) {
  double p[3];
  std::copy(logits, logits + 3, p);
  const double sum = exponentials(p, 3);
  double total = 0;
  for (int k = 0; k < 3; ++k) total += (p[k] / sum - q[k]) * (p[k] / sum - q[k]);
  return total;
}

void test_stability_slope() {
  const double logits[] = {0.4, -0.3, 1.1}, q[] = {0.2, 0.5, 0.3};
  double p[3];
  std::copy(logits, logits + 3, p);
  const double sum = exponentials(p, 3);
  double mean = 0;
  for (int k = 0; k < 3; ++k) {
    p[k] /= sum;
    mean += p[k] * (p[k] - q[k]);
  }
  for (int k = 0; k < 3; ++k) {
    double up[3], down[3];
    std::copy(logits, logits + 3, up);
    std::copy(logits, logits + 3, down);
    up[k] += 1e-6;
    down[k] -= 1e-6;
    const double slope = (squared_distance(up, q) - squared_distance(down, q)) / 2e-6;
    CHECK_NEAR(stability_slope(p[k], p[k] - q[k], mean), slope, 1e-9);
  }
}

void test_labels() {
  CHECK(checked_label(3, 6, 255) == 3);
  CHECK(checked_label(255, 6, 255) == kNotTaken);
  CHECK(checked_label(6, 6, 255) == kOutOfRange);
  CHECK(checked_label(-1, 6, 255) == kOutOfRange);
  CHECK(checked_label(-1, 6, -1) == kNotTaken);
  CHECK(checked_label(2, 6, 2) == kNotTaken); // an ignore_index that is a class: ignored
  CHECK(checked_label((int64_t(1) << 32) + 3, 6, 255) == kOutOfRange);
  CHECK(checked_label((int64_t(1) << 32) + 255, 6, 255) == kOutOfRange);
  const int32_t box[] = {2, 1, 4, 3};
  CHECK(inside_box(box, 1, 2) && inside_box(box, 2, 3));
  CHECK(!inside_box(box, 3, 2) && !inside_box(box, 1, 4) && !inside_box(box, 0, 2));
}

} // namespace

int main() {
  test_exp();
  test_log();
  test_interpolation();
  test_softmax<float>(1e-6);
  test_softmax<double>(1e-14);
  test_softmax_edges();
  test_cross_entropy();
  test_learners();
  test_stability_slope();
  test_labels();
  return co2s_test::finish("pixel_math");
}
