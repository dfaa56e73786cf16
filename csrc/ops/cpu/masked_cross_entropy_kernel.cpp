#include "ops/masked_cross_entropy.h"

#include "ops/cpu/labels.h"
#include "ops/cpu/launch.h"

namespace co2s::CO2S_ISA {
namespace {

template <class T, int K, bool Identity> class CrossEntropy {
  using V = Vec<T>;
  using Args = CrossEntropyArgs<T>;

public:
  static void run(const Args& args, int64_t begin, int64_t end) {
    CrossEntropy kernel(args);
    for (int64_t task = begin; task < end; ++task) {
      args.partial[task] = kernel.band(task / args.plan.bands, task % args.plan.bands);
    }
  }

private:
  explicit CrossEntropy(const Args& args)
      : args_(args),
        maps_{args.target,       args.confidence,     args.ignore_mask, args.mix,
              args.ignore_index, args.logits.classes, args.logits.batch, args.plan.width,
              args.threshold},
        row_size_(args.plan.width + kRowPadding),
        weighted_(args.class_weight != nullptr || args.upstream != nullptr),
        source_(args.logits, args.plan),
        sink_({args.gradient, args.gradient_dtype, args.border}, args.plan, args.logits.classes),
        labels_(kMaxGroupRows * row_size_),
        loss_weights_(args.class_weight != nullptr ? kMaxGroupRows * row_size_ : 0),
        slope_weights_(weighted_ ? kMaxGroupRows * row_size_ : 0), z_(args.logits.classes) {
    for (int64_t i = 0; i < kMaxGroupRows * row_size_; ++i) labels_[i] = kNotTaken;
  }

  CrossEntropyPartial band(int64_t image, int64_t band) {
    partial_ = {};
    image_ = image;
    source_.start_image(image);
    if (sink_.enabled()) sink_.start_band(image, band);
    const int64_t end = args_.plan.band_begin[band + 1];
    for (int64_t y = args_.plan.band_begin[band]; y < end;) {
      const RowGroup group = next_group(args_.plan, y, end);
      run_group(group);
      y = group.end;
    }
    if (sink_.enabled()) sink_.finish_band();
    return partial_;
  }

  void run_group(const RowGroup& group) {
    group_begin_ = group.begin;
    int64_t taken = 0;
    for (int64_t y = group.begin; y < group.end; ++y) taken += prepare_row(y);
    if (sink_.enabled()) sink_.advance(group);
    if (taken > 0) source_.load(group);
    V loss(T(0));
    if (sink_.enabled()) {
      if (taken > 0 || Identity) loss = run_columns<true>(group);
      sink_.finish_row();
    } else if (taken > 0) {
      loss = run_columns<false>(group);
    }
    partial_.loss += sum_lanes(loss);
  }

  int64_t prepare_row(int64_t y) {
    const int64_t offset = row_offset(y);
    int32_t* labels = labels_.get() + offset;
    const PixelCounts counts = read_label_row(maps_, image_, y, labels, &partial_.bad);
    partial_.valid += counts.valid;
    partial_.taken += counts.taken;
    if (weighted_) prepare_weights(labels, offset, y);
    return counts.taken;
  }

  void prepare_weights(const int32_t* labels, int64_t offset, int64_t y) {
    const int64_t width = args_.plan.width;
    const T* upstream =
        args_.upstream ? args_.upstream + (image_ * args_.plan.height + y) * width : nullptr;
    for (int64_t x = 0; x < width; ++x) {
      T weight(1);
      if (args_.class_weight) {
        weight = labels[x] >= 0 ? args_.class_weight[labels[x]] : T(0);
        loss_weights_[offset + x] = weight;
      }
      slope_weights_[offset + x] = weight * args_.scale * (upstream ? upstream[x] : T(1));
    }
  }

  // All columns of the group; the sum of the losses per lane.
  template <bool Gradient> V run_columns(const RowGroup& group) {
    loss_ = V(T(0));
    Spot spots[kChunk];
    int count = 0;
    for (int64_t x = 0; x < args_.plan.width; x += V::kLanes) {
      bool opened = false;
      for (int64_t y = group.begin; y < group.end; ++y) {
        if (!any(load_int<T>(labels_.get() + row_offset(y) + x) >= IntVec<T>(0))) continue;
        if (!opened) source_.open(x);
        opened = true;
        spots[count++] = {y, x};
        if (count == kChunk) run_chunk<Gradient>(spots, kChunk);
        count %= kChunk;
      }
      if constexpr (Identity) { // a chunk lies along the row
        if (Gradient && !opened) sink_.put_zeros(x);
      } else { // a chunk lies across the rows: all of it at the same x
        if (count > 0) run_chunk<Gradient>(spots, count);
        count = 0;
      }
    }
    if (count > 0) run_chunk<Gradient>(spots, count);
    return loss_;
  }

  int64_t row_offset(int64_t y) const {
    return Identity ? 0 : (y - group_begin_) * row_size_;
  }

  template <bool Gradient> __attribute__((noinline)) void run_chunk(const Spot* spots, int count) {
    IntVec<T> label[kChunk];
    V shifted[kChunk];
    for (int i = 0; i < count; ++i) {
      label[i] = load_int<T>(labels_.get() + row_offset(spots[i].y) + spots[i].x);
      source_.read(spots[i].y, spots[i].x, label[i] >= IntVec<T>(0), z_.of(i));
      shifted[i] = V(T(0));
    }
    z_.subtract_max(count);
    for (int k = 0; k < z_.classes(); ++k) {
      const IntVec<T> this_class(k);
      for (int i = 0; i < count; ++i) {
        shifted[i] = select(label[i] == this_class, z_.of(i)[k], shifted[i]);
      }
    }
    z_.exponentiate(count);
    V sum[kChunk];
    for (int i = 0; i < count; ++i) {
      sum[i] = z_.sum(i);
      const V loss = cross_entropy(sum[i], shifted[i], weight_of(loss_weights_, spots[i], label[i],
                                                                 args_.class_weight, T(1)));
      if (args_.loss_map) store_loss(spots[i], loss);
      loss_ = loss_ + loss;
    }
    if constexpr (Gradient) add_slopes(spots, count, label, sum);
  }

  inline __attribute__((always_inline)) V weight_of(Buffer<T>& weights, Spot spot, IntVec<T> label,
                                                    bool weighted, T otherwise) {
    return keep(label >= IntVec<T>(0), weighted ? load(weights.get() + row_offset(spot.y) + spot.x)
                                                : V(otherwise));
  }

  inline __attribute__((always_inline)) void add_slopes(const Spot* spots, int count,
                                                        const IntVec<T>* label, const V* sum) {
    V weight[kChunk], scaled[kChunk], upper[kChunk];
    for (int i = 0; i < count; ++i) {
      weight[i] = weight_of(slope_weights_, spots[i], label[i], weighted_, args_.scale);
      scaled[i] = weight[i] / sum[i];
      if constexpr (!Identity) upper[i] = V(args_.plan.y_upper[spots[i].y]);
    }
    for (int k = 0; k < z_.classes(); ++k) {
      const IntVec<T> this_class(k);
      V total(T(0)), to_high(T(0));
      for (int i = 0; i < count; ++i) {
        const V slope =
            cross_entropy_slope(z_.of(i)[k], scaled[i], label[i] == this_class, weight[i]);
        if constexpr (Identity) {
          sink_.put(spots[i].x, k, slope);
        } else {
          total = total + slope;
          to_high = to_high + upper[i] * slope;
        }
      }
      if constexpr (!Identity) sink_.add(spots[0].x, k, total, to_high);
    }
  }

  void store_loss(Spot spot, V loss) {
    const int64_t left = args_.plan.width - spot.x;
    T* to = args_.loss_map + (image_ * args_.plan.height + spot.y) * args_.plan.width + spot.x;
    if (left >= V::kLanes) {
      store(to, loss);
    } else {
      store_partial(to, loss, left);
    }
  }

  const Args& args_;
  PixelMaps maps_;
  int64_t row_size_, image_ = 0, group_begin_ = 0;
  bool weighted_;
  LogitsSource<T, K, Identity> source_;
  GradientSink<T, K, Identity> sink_;
  Buffer<int32_t> labels_;        // [kMaxGroupRows][row_size]
  Buffer<T> loss_weights_, slope_weights_;
  LogitsChunk<T, K> z_;
  V loss_;
  CrossEntropyPartial partial_;
};

} // namespace

void masked_cross_entropy(const CrossEntropyArgs<float>& args, int64_t begin, int64_t end) {
  run_body<CrossEntropy, float>(args.logits.classes, args.plan.identity, args, begin, end);
}

void masked_cross_entropy(const CrossEntropyArgs<double>& args, int64_t begin, int64_t end) {
  run_body<CrossEntropy, double>(args.logits.classes, args.plan.identity, args, begin, end);
}

} // namespace co2s::CO2S_ISA
