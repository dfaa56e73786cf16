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
      run_columns(group, image);
      y = group.end;
    }
  }

  void run_columns(const RowGroup& group, int64_t image) {
    Spot spots[kChunk];
    int count = 0;
    for (int64_t x = 0; x < args_.plan.width; x += V::kLanes) {
      source_.open(x);
      for (int64_t y = group.begin; y < group.end; ++y) {
        spots[count++] = {y, x};
        if (count == kChunk) run_chunk(image, spots, kChunk);
        count %= kChunk;
      }
      if (!Identity && count > 0) { // what `open` prepared serves this x only
        run_chunk(image, spots, count);
        count = 0;
      }
    }
    if (count > 0) run_chunk(image, spots, count);
  }

  __attribute__((noinline)) void run_chunk(int64_t image, const Spot* spots, int count) {
    IntVec<T> label[kChunk];
    for (int i = 0; i < count; ++i) {
      source_.read(spots[i].y, spots[i].x, IntVec<T>(-1), z_.of(i));
      label[i] = IntVec<T>(0);
    }
    z_.subtract_max(count);
    for (int k = z_.classes() - 1; k >= 0; --k) { // downwards: the lowest of equals remains
      const IntVec<T> this_class(k);
      for (int i = 0; i < count; ++i) {
        label[i] = select(z_.of(i)[k] == V(T(0)), this_class, label[i]);
      }
    }
    z_.exponentiate(count);
    for (int i = 0; i < count; ++i) {
      const V sum = z_.sum(i);
      // A NaN has no class: 0.
      write(image, spots[i], confidence_of(sum), label[i] & (sum == sum));
    }
  }

  inline __attribute__((always_inline)) void write(int64_t image, Spot spot, V confidence,
                                                   IntVec<T> label) {
    const int64_t offset = (image * args_.plan.height + spot.y) * args_.plan.width + spot.x;
    const int64_t left = args_.plan.width - spot.x;
    if (left >= V::kLanes) {
      store(args_.confidence + offset, confidence);
    } else {
      store_partial(args_.confidence + offset, confidence, left);
    }
    if (args_.label != nullptr) {
      write_label(args_.label + offset, label, left);
    } else {
      write_label(args_.byte_label + offset, label, left);
    }
  }

  template <class L>
  inline __attribute__((always_inline)) void write_label(L* to, IntVec<T> label, int64_t left) {
    typedef L Labels __attribute__((vector_size(sizeof(L) * V::kLanes)));
    const Labels labels = __builtin_convertvector(label.v, Labels);
    std::memcpy(to, &labels, left >= V::kLanes ? sizeof(labels) : left * sizeof(L));
  }

  const Args& args_;
  LogitsSource<T, K, Identity> source_;
  LogitsChunk<T, K> z_;
};

} // namespace

void softmax_confidence(const ConfidenceArgs<float>& args, int64_t begin, int64_t end) {
  run_body<Confidence, float>(args.logits.classes, args.plan.identity, args, begin, end);
}

void softmax_confidence(const ConfidenceArgs<double>& args, int64_t begin, int64_t end) {
  run_body<Confidence, double>(args.logits.classes, args.plan.identity, args, begin, end);
}

} // namespace co2s::CO2S_ISA
