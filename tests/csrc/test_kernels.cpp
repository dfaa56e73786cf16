// The CPU kernels of one instruction set, without torch, against the same sums written plainly in
// double. Every array has exactly its own size, so that the address sanitizer sees a step outside.
#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "ops/borders.h"
#include "ops/confusion_matrix.h"
#include "ops/masked_cross_entropy.h"
#include "ops/softmax_confidence.h"
#include "ops/stability_loss.h"
#include "pixel_math.h"

namespace co2s::CO2S_ISA {
namespace {

constexpr int64_t kBatch = 2;
constexpr double kThreshold = 0.6;

struct Shape {
  int64_t classes, in_height, in_width, height, width;
  bool align_corners = false;

  int64_t low() const { return in_height * in_width; }
  int64_t pixels() const { return height * width; }
};

// bfloat16 and half hold these exactly, so that one set of numbers serves all dtypes.
double draw_logit(std::mt19937& generator) {
  return (static_cast<int>(generator() % 65) - 32) / 8.0;
}

template <class S> S pack(double value, Dtype dtype) {
  if constexpr (sizeof(S) == 2) {
    const float x = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == Dtype::kBFloat16) return static_cast<S>(bits >> 16);
    if (x == 0) return 0;
    return static_cast<S>(((bits >> 16) & 0x8000u) | (((bits & 0x7fffffffu) - 0x38000000u) >> 13));
  } else {
    return static_cast<S>(value);
  }
}

// Logits in double, as they are and at every pixel of the label grid, and as the kernels get them.
template <class T, class S> struct Logits {
  Logits(const Shape& s, Dtype dtype, unsigned seed)
      : shape(s), values(kBatch * s.classes * s.low()), storage(new S[values.size()]) {
    std::mt19937 generator(seed);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = draw_logit(generator);
      storage[i] = pack<S>(values[i], dtype);
    }
    view = {storage.get(), dtype,        kBatch,      s.classes, s.in_height, s.in_width,
            s.classes * s.low(), s.low(), s.in_width, 1};
  }

  Tap<T> tap(int64_t i, int64_t in, int64_t out) const {
    return interpolation_tap<T>(i, in, interpolation_scale<T>(in, out, shape.align_corners),
                                shape.align_corners);
  }

  // Calls body(offset in a class plane, weight) for the cells that pixel (y, x) reads.
  template <class F> void each_cell(int64_t y, int64_t x, F body) const {
    if (shape.low() == shape.pixels()) return body(y * shape.width + x, 1.0);
    const Tap<T> v = tap(y, shape.in_height, shape.height), h = tap(x, shape.in_width, shape.width);
    body(v.index0 * shape.in_width + h.index0, double(v.lower) * h.lower);
    body(v.index0 * shape.in_width + h.index1, double(v.lower) * h.upper);
    body(v.index1 * shape.in_width + h.index0, double(v.upper) * h.lower);
    body(v.index1 * shape.in_width + h.index1, double(v.upper) * h.upper);
  }

  std::vector<double> at(int64_t image, int64_t y, int64_t x) const {
    std::vector<double> z(shape.classes, 0.0);
    for (int64_t k = 0; k < shape.classes; ++k) {
      const double* plane = values.data() + (image * shape.classes + k) * shape.low();
      each_cell(y, x, [&](int64_t offset, double weight) { z[k] += weight * plane[offset]; });
    }
    return z;
  }

  Shape shape;
  std::vector<double> values;
  std::unique_ptr<S[]> storage;
  LogitsView view;
};

template <class F> void each_pixel(const Shape& s, F body) {
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t y = 0; y < s.height; ++y) {
      for (int64_t x = 0; x < s.width; ++x) body(b, y, x, (b * s.height + y) * s.width + x);
    }
  }
}

// A gradient's memory as the host gives it to a kernel, and the expected one.
template <class T> struct Gradient {
  Gradient(const Shape& s, const PlanView<T>& p)
      : shape(s), plan(p), count(kBatch * s.classes * s.low()), values(new T[count]()),
        border(new T[kBatch * p.bands * s.classes * s.in_width]()), expected(count, 0.0) {}

  template <class L>
  void expect(const L& logits, int64_t image, int64_t k, int64_t y, int64_t x, double slope) {
    double* plane = expected.data() + (image * shape.classes + k) * shape.low();
    logits.each_cell(y, x, [&](int64_t offset, double weight) { plane[offset] += weight * slope; });
  }

  void check(double tolerance) {
    if (!plan.identity) {
      add_borders(values.get(), border.get(), kBatch, shape.classes, plan);
    }
    double worst = 0;
    for (int64_t i = 0; i < count; ++i) worst = std::max(worst, std::fabs(values[i] - expected[i]));
    CHECK_NEAR(worst, 0.0, tolerance);
  }

  Shape shape;
  PlanView<T> plan;
  int64_t count;
  std::unique_ptr<T[]> values, border;
  std::vector<double> expected;
};

template <class T> Dtype wide_dtype() {
  return sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
}

std::unique_ptr<uint8_t[]> draw_target(const Shape& s) {
  std::unique_ptr<uint8_t[]> target(new uint8_t[kBatch * s.pixels()]);
  std::mt19937 generator(3);
  for (int64_t i = 0; i < kBatch * s.pixels(); ++i) {
    target[i] = generator() % 5 == 0 ? 255 : static_cast<uint8_t>(generator() % s.classes);
  }
  return target;
}

template <class T, class S>
void test_predictions(const Logits<T, S>& logits, const UpsamplingPlan<T>& plan, double tolerance) {
  const Shape& s = logits.shape;
  const int64_t count = kBatch * s.pixels(), tasks = kBatch * plan.bands();
  std::unique_ptr<T[]> confidence(new T[count]);
  std::unique_ptr<int64_t[]> label(new int64_t[count]);
  const ConfidenceArgs<T> args{logits.view, plan.view(), confidence.get(), label.get(),
                               nullptr};
  softmax_confidence(args, 0, tasks);
  std::unique_ptr<uint8_t[]> byte_label(new uint8_t[count]);
  const ConfidenceArgs<T> as_bytes{logits.view, plan.view(), confidence.get(), nullptr,
                                   byte_label.get()};
  softmax_confidence(as_bytes, 0, tasks);
  for (int64_t i = 0; i < count; ++i) CHECK(byte_label[i] == label[i]);
  const auto target = draw_target(s);
  std::vector<BadLabel> bad(tasks);
  std::vector<int64_t> counts(s.classes * s.classes, 0), expected(counts);
  const MapView map{target.get(), Dtype::kUInt8, s.pixels(), s.width, 1};
  const ConfusionArgs<T> confusion{logits.view, plan.view(), map, 255, bad.data()};
  confusion_matrix(confusion, 0, tasks, counts.data());
  double worst = 0;
  each_pixel(s, [&](int64_t b, int64_t y, int64_t x, int64_t i) {
    std::vector<double> z = logits.at(b, y, x);
    const double chosen = z[label[i]], top = *std::max_element(z.begin(), z.end());
    CHECK_NEAR(chosen, top, 1e-4);
    const int classes = static_cast<int>(s.classes);
    worst = std::max(worst, std::fabs(confidence[i] - confidence_of(exponentials(z.data(), classes))));
    if (target[i] != 255) ++expected[target[i] * s.classes + label[i]];
  });
  CHECK_NEAR(worst, 0.0, tolerance);
  CHECK(counts == expected); // both break a tie alike: they see the same logits
  CHECK(std::none_of(bad.begin(), bad.end(), [](const BadLabel& each) { return each.found; }));
}

template <class T, class S>
void test_cross_entropy(const Logits<T, S>& logits, const UpsamplingPlan<T>& plan,
                        double tolerance) {
  const Shape& s = logits.shape;
  const auto target = draw_target(s);
  std::unique_ptr<float[]> confidence(new float[kBatch * s.pixels()]);
  std::mt19937 generator(4);
  for (int64_t i = 0; i < kBatch * s.pixels(); ++i) confidence[i] = (generator() % 100) / 100.0f;
  const int32_t boxes[] = {-2, 1, static_cast<int32_t>(s.width / 2 + 1),
                           static_cast<int32_t>(s.height), 1, 0, 1, 5};
  const int64_t partner[] = {1, 0};
  std::vector<CrossEntropyPartial> partial(kBatch * plan.bands());
  Gradient<T> gradient(s, plan.view());
  CrossEntropyArgs<T> args{};
  args.logits = logits.view;
  args.plan = plan.view();
  args.target = {target.get(), Dtype::kUInt8, s.pixels(), s.width, 1};
  args.confidence = {confidence.get(), Dtype::kFloat32, s.pixels(), s.width, 1};
  args.mix = {boxes, partner};
  args.ignore_index = 255;
  args.threshold = kThreshold;
  args.scale = T(0.5);
  args.gradient = gradient.values.get();
  args.gradient_dtype = wide_dtype<T>();
  args.border = gradient.border.get();
  args.partial = partial.data();
  masked_cross_entropy(args, 0, static_cast<int64_t>(partial.size()));
  double expected = 0, loss = 0;
  int64_t valid = 0, taken = 0;
  each_pixel(s, [&](int64_t b, int64_t y, int64_t x, int64_t i) {
    const int64_t from = inside_box(boxes + 4 * b, y, x) ? i + (partner[b] - b) * s.pixels() : i;
    if (target[from] == 255) return;
    ++valid;
    if (!(confidence[from] >= static_cast<float>(kThreshold))) return;
    ++taken;
    std::vector<double> z = logits.at(b, y, x), e = z;
    const int classes = static_cast<int>(s.classes);
    subtract_max(z.data(), classes);
    const double sum = exponentials(e.data(), classes);
    expected += cross_entropy(sum, z[target[from]], 1.0);
    for (int k = 0; k < classes; ++k) {
      const double slope = cross_entropy_slope(e[k], 1.0 / sum, k == target[from], 1.0);
      gradient.expect(logits, b, k, y, x, 0.5 * slope);
    }
  });
  for (const CrossEntropyPartial& each : partial) {
    loss += each.loss;
    valid -= each.valid;
    taken -= each.taken;
  }
  CHECK(valid == 0 && taken == 0);
  CHECK_NEAR(loss, expected, tolerance * (1 + expected));
  gradient.check(tolerance * 10);
}

template <class T, class S>
void test_stability(const Logits<T, S>& a, const Logits<T, S>& b, const UpsamplingPlan<T>& plan,
                    double tolerance) {
  const Shape& s = a.shape;
  std::vector<StabilityPartial> partial(kBatch * plan.bands());
  Gradient<T> gradients[] = {{s, plan.view()}, {s, plan.view()}};
  StabilityArgs<T> args{};
  args.plan = plan.view();
  args.threshold = kThreshold;
  const Logits<T, S>* logits[] = {&a, &b};
  for (int i = 0; i < 2; ++i) {
    args.logits[i] = logits[i]->view;
    args.scale[i] = T(0.5);
    args.gradient[i] = gradients[i].values.get();
    args.gradient_dtype[i] = wide_dtype<T>();
    args.border[i] = gradients[i].border.get();
  }
  args.partial = partial.data();
  stability_loss(args, 0, static_cast<int64_t>(partial.size()));
  double expected = 0, sums = 0;
  int64_t undecided = 0, count = 0;
  each_pixel(s, [&](int64_t image, int64_t y, int64_t x, int64_t) {
    std::vector<double> p[] = {a.at(image, y, x), b.at(image, y, x)};
    double confidence[2];
    for (int i = 0; i < 2; ++i) {
      const double sum = exponentials(p[i].data(), static_cast<int>(s.classes));
      for (double& each : p[i]) each /= sum;
      confidence[i] = 1 / sum;
    }
    const double gaps[] = {confidence[0] - confidence[1], confidence[0] - kThreshold,
                           confidence[1] - kThreshold};
    for (double gap : gaps) undecided += gap != 0 && std::fabs(gap) < 1e-6;
    const auto who = learners(confidence[0], confidence[1], kThreshold);
    const bool learns[] = {who.a, who.b};
    for (int i = 0; i < 2; ++i) {
      if (!learns[i]) continue;
      ++count;
      double mean = 0;
      for (int64_t k = 0; k < s.classes; ++k) {
        const double difference = p[i][k] - p[1 - i][k];
        expected += difference * difference;
        mean += p[i][k] * difference;
      }
      for (int64_t k = 0; k < s.classes; ++k) {
        const double slope = stability_slope(p[i][k], p[i][k] - p[1 - i][k], mean);
        gradients[i].expect(*logits[i], image, k, y, x, 0.5 * slope);
      }
    }
  });
  CHECK(undecided == 0); // else the case compares rounding; take another seed
  for (const StabilityPartial& each : partial) {
    sums += each.sum[0] + each.sum[1];
    count -= each.count[0] + each.count[1];
  }
  CHECK(count == 0);
  CHECK_NEAR(sums, expected, tolerance * (1 + expected));
  for (Gradient<T>& each : gradients) each.check(tolerance * 10);
}

template <class T, class S> void test_shape(const Shape& s, Dtype dtype) {
  const double tolerance = sizeof(T) == 8 ? 1e-11 : 2e-6;
  const Logits<T, S> a(s, dtype, 1), b(s, dtype, 2);
  const auto plan = make_upsampling_plan<T>(s.in_height, s.in_width, s.height, s.width,
                                            s.align_corners, true);
  test_predictions(a, plan, tolerance);
  test_cross_entropy(a, plan, tolerance);
  test_stability(a, b, plan, tolerance);
}

} // namespace

int run() {
  const Shape shapes[] = {
      {6, 5, 7, 5, 7},                 // equal grids
      {3, 2, 37, 2, 37},               // wider than a vector, and no multiple of one
      {6, 3, 5, 12, 20},               // 4 x
      {9, 3, 11, 6, 33},               // 2 x and 3 x
      {2, 4, 5, 7, 13},                // fractions
      {7, 4, 5, 7, 13, true},
      {5, 9, 11, 4, 5},                // down
      {3, 1, 1, 1, 1},
      {1, 1, 1, 3, 40},                // one class, one cell
      {2, 10, 175, 40, 700},           // several bands
      {40, 2, 3, 4, 6},
  };
  for (const Shape& shape : shapes) test_shape<float, float>(shape, Dtype::kFloat32);
  for (const Shape& shape : {shapes[0], shapes[2], shapes[4], shapes[6]}) {
    test_shape<double, double>(shape, Dtype::kFloat64);
    test_shape<float, uint16_t>(shape, Dtype::kBFloat16);
    test_shape<float, uint16_t>(shape, Dtype::kFloat16);
  }
  return co2s_test::finish("kernels");
}

} // namespace co2s::CO2S_ISA
