#include "ops/confusion_matrix.h"

#include "ops/cpu/labels.h"
#include "ops/cpu/launch.h"

namespace co2s::CO2S_ISA {
namespace {

template <class T, int K, bool Identity> class Confusion {
  using V = Vec<T>;
  using Args = ConfusionArgs<T>;

public:
  static void run(const Args& args, int64_t begin, int64_t end, int64_t* counts) {
    Confusion kernel(args, counts);
    for (int64_t task = begin; task < end; ++task) {
      kernel.band(task / args.plan.bands, task % args.plan.bands, args.bad + task);
    }
  }

private:
  Confusion(const Args& args, int64_t* counts)
      : args_(args), counts_(counts),
        maps_{args.target, {}, {}, {}, args.ignore_index, args.logits.classes, args.logits.batch,
              args.plan.width, 0},
        row_size_(args.plan.width + kRowPadding), source_(args.logits, args.plan),
        labels_(kMaxGroupRows * row_size_), z_(args.logits.classes) {
    for (int64_t i = 0; i < kMaxGroupRows * row_size_; ++i) labels_[i] = kNotTaken;
  }

  void band(int64_t image, int64_t band, BadLabel* bad) {
    *bad = {};
    source_.start_image(image);
    const int64_t end = args_.plan.band_begin[band + 1];
    for (int64_t y = args_.plan.band_begin[band]; y < end;) {
      const RowGroup group = next_group(args_.plan, y, end);
      for (int64_t r = 0; r < group.end - group.begin; ++r) {
        read_label_row(maps_, image, group.begin + r, labels_.get() + r * row_size_, bad);
      }
      source_.load(group);
      for (int64_t x = 0; x < args_.plan.width; x += V::kLanes) {
        source_.open(x);
        for (y = group.begin; y < group.end; ++y) {
          count_pixels(y, x, labels_.get() + (y - group.begin) * row_size_ + x);
        }
      }
      y = group.end;
    }
  }

  inline __attribute__((always_inline)) void count_pixels(int64_t y, int64_t x,
                                                          const int32_t* labels) {
    source_.read(y, x, IntVec<T>(-1), z_.get());
    const auto prediction = argmax<V, IntVec<T>>(z_.get(), source_.classes());
    for (int i = 0; i < V::kLanes; ++i) {
      if (labels[i] >= 0) ++counts_[labels[i] * args_.logits.classes + prediction.v[i]];
    }
  }

  const Args& args_;
  int64_t* counts_;
  PixelMaps maps_;
  int64_t row_size_;
  LogitsSource<T, K, Identity> source_;
  Buffer<int32_t> labels_;
  ClassVector<V, K> z_;
};

} // namespace

void confusion_matrix(const ConfusionArgs<float>& args, int64_t begin, int64_t end,
                      int64_t* counts) {
  run_body<Confusion, float>(args.logits.classes, args.plan.identity, args, begin, end, counts);
}

void confusion_matrix(const ConfusionArgs<double>& args, int64_t begin, int64_t end,
                      int64_t* counts) {
  run_body<Confusion, double>(args.logits.classes, args.plan.identity, args, begin, end, counts);
}

} // namespace co2s::CO2S_ISA
