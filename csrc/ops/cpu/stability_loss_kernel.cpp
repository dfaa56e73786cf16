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
        valid_(kMaxGroupRows * row_size_), p_(args.logits[0].classes),
        q_(args.logits[0].classes) {
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
    run_columns(group);
    if (sink_a_.enabled()) sink_a_.finish_row();
    if (sink_b_.enabled()) sink_b_.finish_row();
    partial_.sum[0] += sum_lanes(sum_a_);
    partial_.sum[1] += sum_lanes(sum_b_);
    partial_.count[0] += count(M::make(M(0).v - count_a_.v));
    partial_.count[1] += count(M::make(M(0).v - count_b_.v));
  }

  void run_columns(const RowGroup& group) {
    Spot spots[kChunk];
    M valid[kChunk];
    int count = 0;
    for (int64_t x = 0; x < args_.plan.width; x += V::kLanes) {
      a_.open(x);
      b_.open(x);
      for (int64_t y = group.begin; y < group.end; ++y) {
        valid[count] = load_int<T>(valid_.get() + (y - group.begin) * row_size_ + x) >= M(0);
        spots[count++] = {y, x};
        if (count == kChunk) run_chunk(spots, valid, kChunk);
        count %= kChunk;
      }
      if (!Identity && count > 0) { // what `open` prepared serves this x only
        run_chunk(spots, valid, count);
        count = 0;
      }
    }
    if (count > 0) run_chunk(spots, valid, count);
  }

  __attribute__((noinline)) void run_chunk(const Spot* spots, const M* valid, int count) {
    for (int i = 0; i < count; ++i) {
      a_.read(spots[i].y, spots[i].x, valid[i], p_.of(i));
      b_.read(spots[i].y, spots[i].x, valid[i], q_.of(i));
    }
    p_.subtract_max(count);
    q_.subtract_max(count);
    p_.exponentiate(count);
    q_.exponentiate(count);
    V inverse_a[kChunk], inverse_b[kChunk];
    M learns_a[kChunk], learns_b[kChunk];
    M some_a(0), some_b(0);
    for (int i = 0; i < count; ++i) {
      inverse_a[i] = confidence_of(p_.sum(i));
      inverse_b[i] = confidence_of(q_.sum(i));
      const auto who =
          learners(inverse_a[i], inverse_b[i], V(static_cast<T>(args_.threshold)));
      learns_a[i] = who.a & valid[i];
      learns_b[i] = who.b & valid[i];
      some_a = some_a | learns_a[i];
      some_b = some_b | learns_b[i];
    }
    const bool any_a = any(some_a), any_b = any(some_b);
    if (any_a || any_b) compare(count, inverse_a, inverse_b, learns_a, learns_b);
    add_slopes(sink_a_, any_a, spots, count, p_, q_, mean_a_, learns_a, args_.scale[0]);
    add_slopes(sink_b_, any_b, spots, count, q_, p_, mean_b_, learns_b, args_.scale[1]);
  }

  // Normalises p and q, and adds up Σ_k (p_k - q_k)² where somebody learns.
  inline __attribute__((always_inline)) void compare(int count, const V* inverse_a,
                                                     const V* inverse_b, const M* learns_a,
                                                     const M* learns_b) {
    for (int i = 0; i < count; ++i) {
      V *p = p_.of(i), *q = q_.of(i);
      V squares(T(0)), mean_a(T(0)), mean_b(T(0));
      for (int k = 0; k < p_.classes(); ++k) {
        p[k] = p[k] * inverse_a[i];
        q[k] = q[k] * inverse_b[i];
        const V difference = p[k] - q[k];
        squares = squares + difference * difference;
        mean_a = mean_a + p[k] * difference;
        mean_b = mean_b - q[k] * difference;
      }
      mean_a_[i] = mean_a;
      mean_b_[i] = mean_b;
      sum_a_ = sum_a_ + keep(learns_a[i], squares);
      sum_b_ = sum_b_ + keep(learns_b[i], squares);
      count_a_ = M::make(count_a_.v - learns_a[i].v);
      count_b_ = M::make(count_b_.v - learns_b[i].v);
    }
  }

  // The gradient for the student with probabilities p, taught by q.
  inline __attribute__((always_inline)) void add_slopes(Sink& sink, bool some, const Spot* spots,
                                                        int count, LogitsChunk<T, K>& p,
                                                        LogitsChunk<T, K>& q, const V* mean,
                                                        const M* learns, T scale) {
    if (!sink.enabled()) return;
    if (!some) {
      for (int i = 0; Identity && i < count; ++i) sink.put_zeros(spots[i].x);
      return;
    }
    for (int k = 0; k < p.classes(); ++k) {
      V total(T(0)), to_high(T(0));
      for (int i = 0; i < count; ++i) {
        const V p_k = p.of(i)[k];
        const V slope =
            keep(learns[i], V(scale) * stability_slope(p_k, p_k - q.of(i)[k], mean[i]));
        if constexpr (Identity) {
          sink.put(spots[i].x, k, slope);
        } else {
          total = total + slope;
          to_high = to_high + V(args_.plan.y_upper[spots[i].y]) * slope;
        }
      }
      if constexpr (!Identity) sink.add(spots[0].x, k, total, to_high);
    }
  }

  const Args& args_;
  int64_t row_size_;
  Source a_, b_;
  Sink sink_a_, sink_b_;
  Buffer<int32_t> valid_; // [kMaxGroupRows][row_size]: 0, or kNotTaken
  LogitsChunk<T, K> p_, q_;
  V mean_a_[kChunk], mean_b_[kChunk];
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
