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
    int64_t taken = 0;
    for (int64_t y = group.begin; y < group.end; ++y) taken += prepare_row(group, y);
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

  int64_t prepare_row(const RowGroup& group, int64_t y) {
    const int64_t offset = (y - group.begin) * row_size_;
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

  // All columns of the group, V at a time; the sum of the losses per lane.
  template <bool Gradient> V run_columns(const RowGroup& group) {
    V loss(T(0));
    const int64_t rows = group.end - group.begin;
    for (int64_t x = 0; x < args_.plan.width; x += V::kLanes) {
      const int32_t* labels = labels_.get() + x;
      if (!any_taken(labels, rows)) {
        if constexpr (Gradient && Identity) {
          sink_.open(x);
          sink_.skip();
        }
        continue;
      }
      source_.open(x);
      if constexpr (Gradient) sink_.open(x);
      for (int64_t r = 0; r < rows; ++r) {
        const IntVec<T> label = load_int<T>(labels + r * row_size_);
        const IntVec<T> taken = label >= IntVec<T>(0);
        if (!Identity && !any(taken)) continue;
        loss = loss + run_pixels<Gradient>(group.begin + r, r * row_size_ + x, label, taken);
      }
      if constexpr (Gradient) sink_.close();
    }
    return loss;
  }

  inline __attribute__((always_inline)) bool any_taken(const int32_t* labels, int64_t rows) {
    IntVec<T> all = load_int<T>(labels);
    for (int64_t r = 1; r < rows; ++r) all = all & load_int<T>(labels + r * row_size_);
    return any(!(IntVec<T>(0) > all)); // the sign survives only where every row has it
  }

  template <bool Gradient>
  inline __attribute__((always_inline)) V run_pixels(int64_t y, int64_t offset, IntVec<T> label,
                                                     IntVec<T> taken) {
    V* z = z_.get();
    source_.read(y, taken, z);
    V logit_of_label(T(0));
    for (int k = 0; k < source_.classes(); ++k) {
      logit_of_label = select(label == IntVec<T>(k), z[k], logit_of_label);
    }
    const SoftmaxState<V> state = exponentials(z, source_.classes());
    const V weight =
        keep(taken, args_.class_weight ? load(loss_weights_.get() + offset) : V(T(1)));
    const V loss = cross_entropy(state, logit_of_label, weight);
    if (args_.loss_map) store_loss(y, loss);
    if constexpr (Gradient) {
      const V slope_weight =
          keep(taken, weighted_ ? load(slope_weights_.get() + offset) : V(args_.scale));
      const V scaled = slope_weight / state.sum;
      for (int k = 0; k < source_.classes(); ++k) {
        sink_.add(y, k, cross_entropy_slope(z[k], scaled, label == IntVec<T>(k), slope_weight));
      }
    }
    return loss;
  }

  void store_loss(int64_t y, V loss) {
    const int64_t x = source_.column(), left = args_.plan.width - x;
    T* to = args_.loss_map + (image_ * args_.plan.height + y) * args_.plan.width + x;
    if (left >= V::kLanes) {
      store(to, loss);
    } else {
      store_partial(to, loss, left);
    }
  }

  const Args& args_;
  PixelMaps maps_;
  int64_t row_size_, image_ = 0;
  bool weighted_;
  LogitsSource<T, K, Identity> source_;
  GradientSink<T, K, Identity> sink_;
  Buffer<int32_t> labels_;        // [kMaxGroupRows][row_size]
  Buffer<T> loss_weights_, slope_weights_;
  ClassVector<V, K> z_;
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
