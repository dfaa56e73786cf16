#include "ops/softmax_confidence.h"

#include "ops/cpu/launch.h"

namespace co2s::CO2S_ISA {
namespace {

template <class T, int K, bool Identity> class Confidence {
  using V = Vec<T>;
  using Args = ConfidenceArgs<T>;

public:
  static void run(const Args& args, int64_t begin, int64_t end) {
    Confidence kernel(args);
    for (int64_t task = begin; task < end; ++task) {
      kernel.band(task / args.plan.bands, task % args.plan.bands);
    }
  }

private:
  explicit Confidence(const Args& args)
      : args_(args), source_(args.logits, args.plan), z_(args.logits.classes) {}

  void band(int64_t image, int64_t band) {
    source_.start_image(image);
    const int64_t end = args_.plan.band_begin[band + 1];
    for (int64_t y = args_.plan.band_begin[band]; y < end;) {
      const RowGroup group = next_group(args_.plan, y, end);
      source_.load(group);
      for (int64_t x = 0; x < args_.plan.width; x += V::kLanes) {
        source_.open(x);
        for (y = group.begin; y < group.end; ++y) {
          run_pixels(y, (image * args_.plan.height + y) * args_.plan.width + x);
        }
      }
      y = group.end;
    }
  }

  inline __attribute__((always_inline)) void run_pixels(int64_t y, int64_t offset) {
    V* z = z_.get();
    source_.read(y, IntVec<T>(-1), z);
    IntVec<T> label = argmax<V, IntVec<T>>(z, source_.classes());
    const V sum = exponentials(z, source_.classes()).sum;
    label = label & (sum == sum); // a NaN has no class: 0
    write(offset, confidence_of(sum), label);
  }

  inline __attribute__((always_inline)) void write(int64_t offset, V confidence, IntVec<T> label) {
    typedef int64_t Wide __attribute__((vector_size(8 * V::kLanes)));
    const Wide wide = __builtin_convertvector(label.v, Wide);
    const int64_t left = args_.plan.width - source_.column();
    if (left >= V::kLanes) {
      store(args_.confidence + offset, confidence);
      std::memcpy(args_.label + offset, &wide, sizeof(wide));
    } else {
      store_partial(args_.confidence + offset, confidence, left);
      std::memcpy(args_.label + offset, &wide, left * sizeof(int64_t));
    }
  }

  const Args& args_;
  LogitsSource<T, K, Identity> source_;
  ClassVector<V, K> z_;
};

} // namespace

void softmax_confidence(const ConfidenceArgs<float>& args, int64_t begin, int64_t end) {
  run_body<Confidence, float>(args.logits.classes, args.plan.identity, args, begin, end);
}

void softmax_confidence(const ConfidenceArgs<double>& args, int64_t begin, int64_t end) {
  run_body<Confidence, double>(args.logits.classes, args.plan.identity, args, begin, end);
}

} // namespace co2s::CO2S_ISA
