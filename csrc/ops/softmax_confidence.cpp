#include "ops/softmax_confidence.h"

#include <torch/library.h>

#include "ops/run_bands.h"

namespace co2s {
namespace {

template <class T>
std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& logits, int64_t height, int64_t width,
                                       bool align_corners, at::ScalarType label_dtype) {
  ConfidenceArgs<T> args{};
  args.logits = logits_view(logits, "logits");
  check_size(height, width);
  const auto plan = make_upsampling_plan<T>(args.logits.height, args.logits.width, height, width,
                                            align_corners, false);
  args.plan = plan.view();
  const int64_t shape[] = {args.logits.batch, height, width};
  at::Tensor confidence = empty_for_writing(shape, wide_dtype(logits));
  at::Tensor label = empty_for_writing(shape, label_dtype);
  args.confidence = confidence.mutable_data_ptr<T>();
  if (label_dtype == at::kByte) {
    args.byte_label = label.mutable_data_ptr<uint8_t>();
  } else {
    args.label = label.mutable_data_ptr<int64_t>();
  }
  run_bands(args.logits.batch, args.plan, [&](int64_t begin, int64_t end) {
    CO2S_CALL_KERNEL(softmax_confidence, args, begin, end);
  });
  return {confidence, label};
}

// confidence [B,H,W], label [B,H,W] of int64 or uint8
std::tuple<at::Tensor, at::Tensor> softmax_confidence(const at::Tensor& logits, int64_t height,
                                                      int64_t width, bool align_corners,
                                                      at::ScalarType label_dtype) {
  TORCH_CHECK_TYPE(label_dtype == at::kLong || label_dtype == at::kByte,
                   "label_dtype: expected int64 or uint8, found ", label_dtype);
  return logits.scalar_type() == at::kDouble
             ? run<double>(logits, height, width, align_corners, label_dtype)
             : run<float>(logits, height, width, align_corners, label_dtype);
}

} // namespace

TORCH_LIBRARY_IMPL(co2s_native, CPU, m) { m.impl("softmax_confidence", &softmax_confidence); }

} // namespace co2s
