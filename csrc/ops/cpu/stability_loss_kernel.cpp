#include "ops/stability_loss.h"

#include "ops/cpu/labels.h"
#include "ops/cpu/launch.h"

namespace co2s::CO2S_ISA {
namespace {

template <class T, int K, bool Identity> class Stability {
  using V = Vec<T>;
  using M = IntVec<T>;
  using Args = StabilityArgs<T>;
  using Source = LogitsSource<T, K, Identity>;
  using Sink = GradientSink<T, K, Identity>;

public:
  static void run(const Args& args, int64_t begin, int64_t end) {
    Stability kernel(args);
    for (int64_t task = begin; task < end; ++task) {
      args.partial[task] = kernel.band(task / args.plan.bands, task % args.plan.bands);
    }
  }

private:
  explicit Stability(const Args& args)
      : args_(args), row_size_(args.plan.width + kRowPadding),
        a_(args.logits[0], args.plan), b_(args.logits[1], args.plan),
        sink_a_(gradient_view(args, 0), args.plan, args.logits[0].classes),
        sink_b_(gradient_view(args, 1), args.plan, args.logits[0].classes),
        valid_(kMaxGroupRows * row_size_), z_a_(args.logits[0].classes),
        z_b_(args.logits[0].classes) {
    // The padding never counts.
    for (int64_t i = 0; i < kMaxGroupRows * row_size_; ++i) {
      valid_[i] = i % row_size_ < args.plan.width ? 0 : kNotTaken;
    }
  }

  static GradientView gradient_view(const Args& args, int which) {
    return {args.gradient[which], args.gradient_dtype[which], args.border[which]};
  }

  StabilityPartial band(int64_t image, int64_t band) {
    partial_ = {};
    a_.start_image(image);
    b_.start_image(image);
    if (sink_a_.enabled()) sink_a_.start_band(image, band);
    if (sink_b_.enabled()) sink_b_.start_band(image, band);
    const int64_t end = args_.plan.band_begin[band + 1];
    for (int64_t y = args_.plan.band_begin[band]; y < end;) {
      const RowGroup group = next_group(args_.plan, y, end);
      if (args_.ignore_mask.data != nullptr) read_mask(image, group);
      run_group(group);
      y = group.end;
    }
    if (sink_a_.enabled()) sink_a_.finish_band();
    if (sink_b_.enabled()) sink_b_.finish_band();
    return partial_;
  }

  void read_mask(int64_t image, const RowGroup& group) {
    const PixelMaps maps{{}, {}, args_.ignore_mask, {}, args_.ignore_index, 0, 0,
                         args_.plan.width, 0};
    for (int64_t y = group.begin; y < group.end; ++y) {
      int32_t* valid = valid_.get() + (y - group.begin) * row_size_;
      std::memset(valid, 0, args_.plan.width * sizeof(int32_t));
      apply_ignore_mask(maps, {image, 0, args_.plan.width}, y, valid);
    }
  }

  void run_group(const RowGroup& group) {
    a_.load(group);
    b_.load(group);
    if (sink_a_.enabled()) sink_a_.advance(group);
    if (sink_b_.enabled()) sink_b_.advance(group);
    sum_a_ = sum_b_ = V(T(0));
    count_a_ = count_b_ = M(0);
    for (int64_t x = 0; x < args_.plan.width; x += V::kLanes) {
      a_.open(x);
      b_.open(x);
      sink_a_.open(x);
      sink_b_.open(x);
      bool some_a = false, some_b = false;
      for (int64_t y = group.begin; y < group.end; ++y) {
        const M valid = load_int<T>(valid_.get() + (y - group.begin) * row_size_ + x) >= M(0);
        run_pixels(y, valid, &some_a, &some_b);
      }
      close(sink_a_, some_a);
      close(sink_b_, some_b);
    }
    if (sink_a_.enabled()) sink_a_.finish_row();
    if (sink_b_.enabled()) sink_b_.finish_row();
    partial_.sum[0] += sum_lanes(sum_a_);
    partial_.sum[1] += sum_lanes(sum_b_);
    partial_.count[0] += count(M::make(M(0).v - count_a_.v));
    partial_.count[1] += count(M::make(M(0).v - count_b_.v));
  }

  inline __attribute__((always_inline)) void close(Sink& sink, bool some) {
    if (!sink.enabled()) return;
    if (some) {
      sink.close();
    } else {
      sink.skip();
    }
  }

  inline __attribute__((always_inline)) void run_pixels(int64_t y, M valid, bool* some_a,
                                                        bool* some_b) {
    V *p = z_a_.get(), *q = z_b_.get();
    a_.read(y, valid, p);
    b_.read(y, valid, q);
    const V inverse_a = confidence_of(exponentials(p, a_.classes()).sum);
    const V inverse_b = confidence_of(exponentials(q, a_.classes()).sum);
    auto who = learners(inverse_a, inverse_b, V(static_cast<T>(args_.threshold)));
    who.a = who.a & valid;
    who.b = who.b & valid;
    const bool any_a = any(who.a), any_b = any(who.b);
    if (!any_a && !any_b) return;

    V squares(T(0)), mean_a(T(0)), mean_b(T(0));
    for (int k = 0; k < a_.classes(); ++k) {
      p[k] = p[k] * inverse_a;
      q[k] = q[k] * inverse_b;
      const V difference = p[k] - q[k];
      squares = squares + difference * difference;
      mean_a = mean_a + p[k] * difference;
      mean_b = mean_b - q[k] * difference;
    }
    sum_a_ = sum_a_ + keep(who.a, squares);
    sum_b_ = sum_b_ + keep(who.b, squares);
    count_a_ = M::make(count_a_.v - who.a.v);
    count_b_ = M::make(count_b_.v - who.b.v);
    if (any_a && sink_a_.enabled()) {
      *some_a = true;
      const V scale = V(args_.scale[0]);
      for (int k = 0; k < a_.classes(); ++k) {
        const V slope = stability_slope(p[k], p[k] - q[k], mean_a);
        sink_a_.add(y, k, keep(who.a, scale * slope));
      }
    }
    if (any_b && sink_b_.enabled()) {
      *some_b = true;
      const V scale = V(args_.scale[1]);
      for (int k = 0; k < a_.classes(); ++k) {
        const V slope = stability_slope(q[k], q[k] - p[k], mean_b);
        sink_b_.add(y, k, keep(who.b, scale * slope));
      }
    }
  }

  const Args& args_;
  int64_t row_size_;
  Source a_, b_;
  Sink sink_a_, sink_b_;
  Buffer<int32_t> valid_; // [kMaxGroupRows][row_size]: 0, or kNotTaken
  ClassVector<V, K> z_a_, z_b_;
  V sum_a_, sum_b_;
  M count_a_, count_b_;
  StabilityPartial partial_;
};

} // namespace

void stability_loss(const StabilityArgs<float>& args, int64_t begin, int64_t end) {
  run_body<Stability, float>(args.logits[0].classes, args.plan.identity, args, begin, end);
}

void stability_loss(const StabilityArgs<double>& args, int64_t begin, int64_t end) {
  run_body<Stability, double>(args.logits[0].classes, args.plan.identity, args, begin, end);
}

} // namespace co2s::CO2S_ISA
