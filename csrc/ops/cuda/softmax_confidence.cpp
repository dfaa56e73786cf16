// softmax_confidence on CUDA tensors.
#include "ops/cuda/arguments.h"

namespace co2s::cuda {
namespace {

template <class T>
std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& logits, int64_t height, int64_t width,
                                       bool align_corners, at::ScalarType label_dtype) {
  const OnDeviceOf device(logits);
  ConfidenceProblem<T> problem{};
  problem.logits = logits_view(logits, "logits", CO2S_CUDA_DEVICE);
  check_size(height, width);
  check_extent(problem.logits, height, width);
  const int64_t batch = problem.logits.batch;
  const auto options = logits.options();
  at::Tensor confidence = at::empty({batch, height, width}, options.dtype(wide_dtype(logits)));
  at::Tensor label = at::empty({batch, height, width}, options.dtype(label_dtype));
  if (batch == 0) return {confidence, label};
  problem.grid = make_grid<T>(problem.logits.height, problem.logits.width, height, width,
                              align_corners);
  const Choice choice = choose(&problem.logits, 1, problem.grid.equal, batch, height, width);
  problem.registers = choice.registers;
  problem.blocks = choice.blocks;
  problem.confidence = confidence.mutable_data_ptr<T>();
  if (label_dtype == at::kByte) {
    problem.byte_label = label.mutable_data_ptr<uint8_t>();
  } else {
    problem.label = label.mutable_data_ptr<int64_t>();
  }
  launch_softmax_confidence(problem, device.stream());
  return {confidence, label};
}

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

CO2S_CUDA_IMPL(m) { m.impl("softmax_confidence", &softmax_confidence); }

} // namespace co2s::cuda
