#include "ops/confusion_matrix.h"

#include <torch/library.h>

#include <mutex>

#include "ops/run_bands.h"

namespace co2s {
namespace {

template <class T>
void run(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index,
         bool align_corners, at::Tensor& out) {
  ConfusionArgs<T> args{};
  args.logits = logits_view(logits, "logits");
  TORCH_CHECK_VALUE(target.dim() == 3, "target: expected shape [B, H, W], found ",
                    target.sizes());
  const int64_t shape[] = {args.logits.batch, target.size(1), target.size(2)};
  args.target = integer_map(target, shape, logits, "target");
  check_size(shape[1], shape[2]);
  args.ignore_index = ignore_index;
  const auto plan = make_upsampling_plan<T>(args.logits.height, args.logits.width, shape[1],
                                            shape[2], align_corners, false);
  args.plan = plan.view();
  std::vector<BadLabel> bad(shape[0] * args.plan.bands);
  args.bad = bad.data();

  const int64_t classes = args.logits.classes;
  std::vector<int64_t> total(classes * classes, 0);
  std::mutex mutex; // integers: the order of adding does not matter
  run_bands(args.logits.batch, args.plan, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> counts(classes * classes, 0);
    CO2S_CALL_KERNEL(confusion_matrix, args, begin, end, counts.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < total.size(); ++i) total[i] += counts[i];
  });
  for (const BadLabel& each : bad) raise_bad_label(each, classes, ignore_index);
  out.add_(at::from_blob(total.data(), {classes, classes}, at::TensorOptions().dtype(at::kLong)));
}

// Rows of out [K,K]: truth, columns: prediction.
void confusion_matrix(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index,
                      bool align_corners, at::Tensor& out) {
  TORCH_CHECK_TYPE(out.scalar_type() == at::kLong, "out: expected int64, found ",
                   out.scalar_type());
  TORCH_CHECK_VALUE(logits.dim() == 4 && out.dim() == 2 && out.size(0) == logits.size(1) &&
                        out.size(1) == logits.size(1),
                    "out: expected shape [K, K] for logits of shape ", logits.sizes(), ", found ",
                    out.sizes());
  if (logits.scalar_type() == at::kDouble) {
    run<double>(logits, target, ignore_index, align_corners, out);
  } else {
    run<float>(logits, target, ignore_index, align_corners, out);
  }
}

} // namespace

TORCH_LIBRARY_IMPL(co2s_native, CPU, m) { m.impl("confusion_matrix", &confusion_matrix); }

} // namespace co2s
