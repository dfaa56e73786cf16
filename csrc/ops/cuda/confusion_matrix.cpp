// confusion_matrix on CUDA tensors.
#include "ops/cuda/arguments.h"

namespace co2s::cuda {
namespace {

template <class T>
void run(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index,
         bool align_corners, at::Tensor& out) {
  const OnDeviceOf device(logits);
  ConfusionProblem<T> problem{};
  problem.logits = logits_view(logits, "logits", CO2S_CUDA_DEVICE);
  TORCH_CHECK_VALUE(target.dim() == 3, "target: expected shape [B, H, W], found ",
                    target.sizes());
  const int64_t batch = problem.logits.batch, height = target.size(1), width = target.size(2);
  check_size(height, width);
  check_extent(problem.logits, height, width);
  PixelMaps& maps = problem.maps;
  maps.target = integer_map(target, {batch, height, width}, logits, "target");
  maps.ignore_index = ignore_index;
  maps.batch = batch;
  maps.classes = problem.logits.classes;
  maps.width = static_cast<int32_t>(width);
  maps.aligned = aligned_pixels(maps, height);
  if (batch == 0) return;
  problem.grid = make_grid<T>(problem.logits.height, problem.logits.width, height, width,
                              align_corners);
  const int64_t length = 16 / logits.element_size();
  problem.vectors = problem.grid.equal && has_vectors(problem.logits, length);
  problem.blocks = problem.grid.equal
                       ? equal_blocks(batch, height * width / (problem.vectors ? length : 1))
                       : column_blocks(batch, height, width);
  problem.out = out.mutable_data_ptr<int64_t>();
  problem.out_row = out.stride(0);
  problem.out_column = out.stride(1);
  launch_confusion_matrix(problem, device.stream());
}

// Rows of out [K,K]: truth, columns: prediction.
void confusion_matrix(const at::Tensor& logits, const at::Tensor& target, int64_t ignore_index,
                      bool align_corners, at::Tensor& out) {
  TORCH_CHECK_TYPE(out.scalar_type() == at::kLong, "out: expected int64, found ",
                   out.scalar_type());
  TORCH_CHECK_VALUE(logits.dim() == 4 && out.dim() == 2 && out.size(0) == logits.size(1) &&
                        out.size(1) == logits.size(1) && out.device() == logits.device(),
                    "out: expected shape [K, K] on the device of logits of shape ",
                    logits.sizes(), ", found ", out.sizes(), " on ", out.device());
  if (logits.scalar_type() == at::kDouble) {
    run<double>(logits, target, ignore_index, align_corners, out);
  } else {
    run<float>(logits, target, ignore_index, align_corners, out);
  }
}

} // namespace

CO2S_CUDA_IMPL(m) { m.impl("confusion_matrix", &confusion_matrix); }

} // namespace co2s::cuda
