// stability_loss and its gradients on CUDA tensors.
#include <algorithm>

#include "ops/cuda/arguments.h"

namespace co2s::cuda {
namespace {

// The arguments forward and backward share, in the schema's order.
struct Inputs {
  const at::Tensor& logits_a; // [B,K,h,w]
  const at::Tensor& logits_b; // [B,K,h,w]
  double threshold;
  int64_t height, width;
  const OptionalTensor& ignore_mask; // [B,H,W]
  int64_t ignore_index;
  bool align_corners;
};

template <class T> StabilityProblem<T> prepare(const Inputs& in) {
  StabilityProblem<T> problem{};
  problem.logits[0] = logits_view(in.logits_a, "logits_a", CO2S_CUDA_DEVICE);
  problem.logits[1] = logits_view(in.logits_b, "logits_b", CO2S_CUDA_DEVICE);
  TORCH_CHECK_VALUE(in.logits_a.sizes() == in.logits_b.sizes() &&
                        in.logits_a.device() == in.logits_b.device(),
                    "logits_b: expected shape ", in.logits_a.sizes(), " on ",
                    in.logits_a.device(), ", as logits_a, found ", in.logits_b.sizes(), " on ",
                    in.logits_b.device());
  TORCH_CHECK_TYPE(in.logits_a.scalar_type() == in.logits_b.scalar_type(),
                   "logits_b: expected the dtype of logits_a, ", in.logits_a.scalar_type(),
                   ", found ", in.logits_b.scalar_type());
  check_threshold(in.threshold);
  check_size(in.height, in.width);
  check_extent(problem.logits[0], in.height, in.width);
  const int64_t batch = problem.logits[0].batch, shape[] = {batch, in.height, in.width};
  if (in.ignore_mask) {
    problem.maps.ignore_mask =
        integer_map(*in.ignore_mask, shape, in.logits_a, "ignore_mask");
  }
  problem.maps.ignore_index = in.ignore_index;
  problem.maps.width = static_cast<int32_t>(in.width);
  problem.maps.aligned = aligned_pixels(problem.maps, in.height);
  problem.maps.flat = are_flat(problem.maps, batch, in.height);
  problem.threshold = static_cast<T>(in.threshold);
  problem.grid = make_grid<T>(problem.logits[0].height, problem.logits[0].width, in.height,
                              in.width, in.align_corners);
  const Choice choice =
      choose(problem.logits, 2, problem.grid.equal, batch, in.height, in.width);
  problem.registers = choice.registers;
  problem.blocks = choice.blocks;
  problem.images = batch;
  return problem;
}

template <class T>
PairTensors forward(const Inputs& in, bool with_grad_a, bool with_grad_b, bool mean) {
  const OnDeviceOf device(in.logits_a);
  StabilityProblem<T> problem = prepare<T>(in);
  const auto wide = in.logits_a.options().dtype(wide_dtype(in.logits_a));
  const auto whole = in.logits_a.options().dtype(at::kLong);
  // As for the cross-entropy: through up() one walk finds the gradients with the loss.
  const bool can_fuse =
      !problem.grid.equal && has_fused_gradient(problem.registers, kMostTransposedPair);
  const bool want[] = {with_grad_a && can_fuse, with_grad_b && can_fuse};
  const bool fused = want[0] || want[1];
  at::Tensor saved[2];
  for (int i = 0; i < 2; ++i) {
    saved[i] = want[i] ? at::empty(in.logits_a.sizes(), wide, at::MemoryFormat::Contiguous)
                       : at::empty({0}, wide);
    problem.gradient[i] = want[i] ? saved[i].data_ptr() : nullptr;
  }
  if (problem.logits[0].batch == 0) {
    return {at::zeros({2}, wide), at::zeros({2}, whole), saved[0], saved[1],
            at::full({mean ? 2 : 0}, 1.0 / static_cast<double>(in.logits_a.size(1)), wide)};
  }
  at::Tensor sums = at::empty({2}, wide), counts = at::empty({2}, whole);
  at::Tensor scale = at::empty({mean ? 2 : 0}, wide);
  int64_t blocks = problem.blocks.all;
  if (fused) blocks = count_tiles(problem.grid, problem.logits[0], problem.registers, 2);
  const at::Tensor partial = new_partials(blocks, in.logits_a);
  problem.partial = partials(partial);
  if (fused) {
    launch_stability_with_gradients(problem, device.stream());
  } else {
    launch_stability(problem, device.stream());
  }
  Totals<T> totals{2, sums.mutable_data_ptr<T>(), counts.mutable_data_ptr<int64_t>()};
  if (mean) {
    totals.scale = scale.mutable_data_ptr<T>();
    totals.times = in.logits_a.size(1);
  }
  launch_sum_partials(problem.partial, blocks, totals, device.stream());
  return {sums, counts, saved[0], saved[1], scale};
}

// Through up(), many classes: groups of images, so that the scratch stays small.
template <class T>
void backward_in_groups(StabilityProblem<T>& problem, const Inputs& in, Stream stream) {
  const int64_t batch = problem.logits[0].batch, items = kStabilityStatisticsItems;
  const int64_t group = images_at_once(batch, in.height, in.width, items * sizeof(T));
  const at::Tensor scratch =
      at::empty({group, in.height, in.width, items},
                in.logits_a.options().dtype(wide_dtype(in.logits_a)));
  problem.statistics = static_cast<StabilityStatistics<T>*>(scratch.data_ptr());
  for (int64_t first = 0; first < batch; first += group) {
    problem.first_image = first;
    problem.images = std::min(group, batch - first);
    problem.blocks = column_blocks(problem.images, in.height, in.width);
    launch_stability_backward(problem, stream);
  }
}

template <class T>
std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_sums, const Inputs& in,
                                            bool need_a, bool need_b) {
  const OnDeviceOf device(in.logits_a);
  StabilityProblem<T> problem = prepare<T>(in);
  const bool need[] = {need_a, need_b};
  at::Tensor gradient[2];
  for (int i = 0; i < 2; ++i) {
    gradient[i] = need[i] ? at::empty(in.logits_a.sizes(), in.logits_a.options(),
                                      at::MemoryFormat::Contiguous)
                          : at::empty({0}, in.logits_a.options());
    problem.gradient[i] = need[i] ? gradient[i].data_ptr() : nullptr;
  }
  if (problem.logits[0].batch == 0 || !(need_a || need_b)) return {gradient[0], gradient[1]};
  TORCH_CHECK_VALUE(grad_sums.dim() == 1 && grad_sums.size(0) == 2 &&
                        grad_sums.device() == in.logits_a.device(),
                    "grad_sums: expected shape [2] on ", in.logits_a.device(), ", found ",
                    grad_sums.sizes(), " on ", grad_sums.device());
  const at::Tensor upstream = grad_sums.to(wide_dtype(in.logits_a)).contiguous();
  problem.upstream = upstream.const_data_ptr<T>();
  const bool in_passes = problem.registers == 0 || problem.registers > kMostTransposedPair;
  if (!problem.grid.equal && in_passes) {
    backward_in_groups(problem, in, device.stream());
  } else {
    launch_stability_backward(problem, device.stream());
  }
  return {gradient[0], gradient[1]};
}

PairTensors stability_loss(
    const at::Tensor& logits_a, const at::Tensor& logits_b, double threshold, int64_t height,
    int64_t width, const OptionalTensor& ignore_mask, int64_t ignore_index, bool align_corners,
    bool with_grad_a, bool with_grad_b, bool mean) {
  const Inputs in{logits_a,    logits_b,     threshold,    height, width,
                  ignore_mask, ignore_index, align_corners};
  return logits_a.scalar_type() == at::kDouble
             ? forward<double>(in, with_grad_a, with_grad_b, mean)
             : forward<float>(in, with_grad_a, with_grad_b, mean);
}

std::tuple<at::Tensor, at::Tensor> stability_loss_backward(
    const at::Tensor& grad_sums, const at::Tensor& logits_a, const at::Tensor& logits_b,
    double threshold, int64_t height, int64_t width, const OptionalTensor& ignore_mask,
    int64_t ignore_index, bool align_corners, bool need_a, bool need_b,
    const at::Tensor& saved_a, const at::Tensor& saved_b) {
  if ((!need_a || saved_a.dim() == 4) && (!need_b || saved_b.dim() == 4)) {
    const auto gradient = [&](bool need, const at::Tensor& saved, int64_t i) {
      return need ? scaled(saved, grad_sums.select(0, i), logits_a)
                  : at::empty({0}, logits_a.options());
    };
    return {gradient(need_a, saved_a, 0), gradient(need_b, saved_b, 1)};
  }
  const Inputs in{logits_a,    logits_b,     threshold,    height, width,
                  ignore_mask, ignore_index, align_corners};
  return logits_a.scalar_type() == at::kDouble ? backward<double>(grad_sums, in, need_a, need_b)
                                               : backward<float>(grad_sums, in, need_a, need_b);
}

} // namespace

CO2S_CUDA_IMPL(m) {
  m.impl("stability_loss", &stability_loss);
  m.impl("stability_loss_backward", &stability_loss_backward);
}

} // namespace co2s::cuda
