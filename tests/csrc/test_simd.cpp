// The vectors of simd.h and the row conversions of rows.h, lane by lane against scalars. Compiled
// once per instruction set; simd_main.cpp runs it where the CPU has that set.
#include <initializer_list>

#include "check.h"
#include "ops/cpu/rows.h"

namespace co2s::CO2S_ISA {
namespace {

using V = Vec<float>;
constexpr int kLanes = V::kLanes;

void test_math() {
  float x[kLanes], y[kLanes];
  for (float start = -87.0f; start < 0.0f; start += 0.37f) {
    for (int i = 0; i < kLanes; ++i) x[i] = start + 0.017f * i < 0 ? start + 0.017f * i : 0.0f;
    store(y, exp_nonpositive(load(x)));
    for (int i = 0; i < kLanes; ++i) {
      const double expected = std::exp(double(x[i]));
      CHECK_NEAR(y[i], expected, 2.4e-7 * expected);
    }
    for (int i = 0; i < kLanes; ++i) x[i] = 1.0f - start * (i + 1);
    store(y, log_positive(load(x)));
    for (int i = 0; i < kLanes; ++i) CHECK_NEAR(y[i], std::log(double(x[i])), 5e-7);
  }
  for (int i = 0; i < kLanes; ++i) x[i] = i == 1 ? std::nanf("7") : -1.0f;
  store(y, exp_nonpositive(load(x)));
  CHECK(std::isnan(y[1]) && !std::isnan(y[0]));
  store(y, log_positive(V(0.0f) - load(x)));
  CHECK(std::isnan(y[1]) && y[0] == 0.0f);
  store(y, keep(IntVec<float>(0), load(x)));
  CHECK(y[1] == 0.0f);
}

void test_lanes() {
  float x[2 * kLanes], y[kLanes];
  int32_t offset[kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) x[i] = static_cast<float>(i * i);
  for (int i = 0; i < kLanes; ++i) offset[i] = (i * 3) % kLanes;
  for (bool near : {false, true}) {
    store(y, take(x + 1, load_int<float>(offset), near));
    for (int i = 0; i < kLanes; ++i) CHECK(y[i] == x[1 + offset[i]]);
  }
  double expected = 0;
  for (int i = 0; i < kLanes; ++i) expected += x[i];
  CHECK(sum_lanes(load(x)) == expected);
  CHECK(add_lanes(load(x)) == static_cast<float>(expected));
  CHECK(!any(IntVec<float>(0)) && any(load_int<float>(offset) == IntVec<float>(3 % kLanes)));
  CHECK(count(load_int<float>(offset) >= IntVec<float>(0)) == kLanes);
  store(y, load_partial(x + 2, kLanes - 1));
  CHECK(y[0] == x[2] && y[kLanes - 1] == 0.0f);
}

void test_half_types() {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const Half half{static_cast<uint16_t>(bits)};
    const float value = widen(half);
    Half back;
    narrow(value, &back);
    CHECK(std::isnan(value) ? std::isnan(widen(back)) : back.bits == half.bits);
    const BFloat16 brain{static_cast<uint16_t>(bits)};
    BFloat16 brain_back;
    narrow(widen(brain), &brain_back);
    CHECK(std::isnan(widen(brain)) ? std::isnan(widen(brain_back)) : brain_back.bits == brain.bits);
  }
  Half half;
  narrow(1.0f + 0x1p-11f, &half); // a tie: to even
  CHECK(half.bits == 0x3c00);
  narrow(65520.0f, &half);
  CHECK(half.bits == 0x7c00);
  narrow(0x1p-25f * 1.5f, &half); // rounds up to the smallest subnormal
  CHECK(half.bits == 1);
  BFloat16 brain;
  narrow(1.0f + 0x1p-8f, &brain);
  CHECK(brain.bits == 0x3f80);
}

} // namespace

int run() {
  test_math();
  test_lanes();
  test_half_types();
  return co2s_test::finish("simd");
}

} // namespace co2s::CO2S_ISA
