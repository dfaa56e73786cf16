// masked_cross_entropy and its gradient on CUDA tensors.
#include <algorithm>

#include "ops/cuda/arguments.h"

namespace co2s::cuda {
namespace {

// The arguments forward and backward share, in the schema's order.
struct Inputs {
  const at::Tensor& logits; // [B,K,h,w]
  const at::Tensor& target; // [B,H,W]
  const OptionalTensor& confidence;
  double threshold;
  const OptionalTensor& ignore_mask;
  int64_t ignore_index;
  const OptionalTensor& class_weight; // [K]
  const OptionalTensor& boxes;        // [B,4]
  const OptionalTensor& partner;      // [B]
  bool align_corners;
};

// The problem and the tensors that its pointers need alive.
template <class T> struct Prepared {
  CrossEntropyProblem<T> problem{};
  Boxes boxes;
  at::Tensor class_weight;
  int64_t height, width;
  bool empty;
};

template <class T> Prepared<T> prepare(const Inputs& in) {
  Prepared<T> prepared;
  CrossEntropyProblem<T>& problem = prepared.problem;
  check_threshold(in.threshold);
  problem.logits = logits_view(in.logits, "logits", CO2S_CUDA_DEVICE);
  TORCH_CHECK_VALUE(in.target.dim() == 3, "target: expected shape [B, H, W], found ",
                    in.target.sizes());
  const int64_t batch = problem.logits.batch;
  const int64_t shape[] = {batch, in.target.size(1), in.target.size(2)};
  check_size(shape[1], shape[2]);
  check_extent(problem.logits, shape[1], shape[2]);
  PixelMaps& maps = problem.maps;
  maps.target = integer_map(in.target, shape, in.logits, "target");
  if (in.confidence) {
    maps.confidence = float_map(*in.confidence, shape, in.logits, "confidence");
  }
  if (in.ignore_mask) {
    maps.ignore_mask = integer_map(*in.ignore_mask, shape, in.logits, "ignore_mask");
  }
  prepared.boxes = checked_boxes(in.boxes, in.partner, batch, in.logits);
  maps.mix = prepared.boxes.view();
  maps.ignore_index = in.ignore_index;
  maps.batch = batch;
  maps.classes = problem.logits.classes;
  maps.width = static_cast<int32_t>(shape[2]);
  maps.threshold = in.threshold;
  maps.float_threshold = static_cast<float>(in.threshold);
  maps.aligned = aligned_pixels(maps, shape[1]);
  maps.flat = are_flat(maps, batch, shape[1]);
  if (in.class_weight) {
    const at::Tensor& weight = *in.class_weight;
    TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == maps.classes &&
                          weight.device() == in.logits.device(),
                      "class_weight: expected shape [", maps.classes, "] on ", in.logits.device(),
                      ", found ", weight.sizes(), " on ", weight.device());
    prepared.class_weight = weight.to(wide_dtype(in.logits)).contiguous();
    problem.class_weight = prepared.class_weight.template const_data_ptr<T>();
  }
  problem.grid = make_grid<T>(problem.logits.height, problem.logits.width, shape[1], shape[2],
                              in.align_corners);
  const Choice choice =
      choose(&problem.logits, 1, problem.grid.equal, batch, shape[1], shape[2]);
  problem.registers = choice.registers;
  problem.blocks = choice.blocks;
  problem.images = batch;
  prepared.height = shape[1];
  prepared.width = shape[2];
  prepared.empty = batch == 0;
  return prepared;
}

template <class T>
LossTensors forward(const Inputs& in, bool per_pixel, bool with_grad, int64_t mean_over) {
  check_mean_over(mean_over, per_pixel);
  const OnDeviceOf device(in.logits);
  Prepared<T> prepared = prepare<T>(in);
  CrossEntropyProblem<T>& problem = prepared.problem;
  const auto wide = in.logits.options().dtype(wide_dtype(in.logits));
  const auto whole = in.logits.options().dtype(at::kLong);
  // Through up() the gradient is small, and one walk finds it with the loss. On equal grids it is
  // as large as the logits: there the backward computes it again, and fewer bytes move.
  const bool fused = with_grad && !per_pixel && !problem.grid.equal &&
                     has_fused_gradient(problem.registers, kMostTransposed);
  const at::Tensor saved =
      fused ? at::empty(in.logits.sizes(), wide, at::MemoryFormat::Contiguous)
            : at::empty({0}, wide);
  if (prepared.empty) {
    return {at::zeros(per_pixel ? in.target.sizes() : at::IntArrayRef{}, wide),
            at::zeros({2}, whole), saved,
            mean_over < 0 ? at::empty({0}, wide) : at::ones({}, wide)};
  }
  at::Tensor loss = at::empty(per_pixel ? in.target.sizes() : at::IntArrayRef{}, wide);
  at::Tensor counts = at::empty({2}, whole);
  const at::Tensor scale =
      mean_over < 0 ? at::empty({0}, wide) : at::empty(at::IntArrayRef{}, wide);
  int64_t blocks = problem.blocks.all;
  if (fused) blocks = count_tiles(problem.grid, problem.logits, problem.registers, 1);
  const at::Tensor partial = new_partials(blocks, in.logits);
  problem.partial = partials(partial);
  if (fused) {
    problem.gradient = saved.data_ptr();
    launch_cross_entropy_with_gradient(problem, device.stream());
  } else {
    if (per_pixel) problem.loss_map = loss.mutable_data_ptr<T>();
    launch_cross_entropy(problem, device.stream());
  }
  Totals<T> totals{per_pixel ? 0 : 1, loss.mutable_data_ptr<T>(),
                   counts.mutable_data_ptr<int64_t>(), nullptr, {static_cast<int>(mean_over), 0}};
  if (mean_over >= 0) totals.scale = scale.mutable_data_ptr<T>();
  launch_sum_partials(problem.partial, blocks, totals, device.stream());
  return {loss, counts, saved, scale};
}

// Through up(), many classes: groups of images, so that the scratch stays small.
template <class T>
void backward_in_groups(Prepared<T>& prepared, const at::Tensor& logits, Stream stream) {
  CrossEntropyProblem<T>& problem = prepared.problem;
  const int64_t batch = problem.logits.batch, items = kCrossEntropyStatisticsItems;
  const int64_t group = images_at_once(batch, prepared.height, prepared.width, items * sizeof(T));
  const at::Tensor scratch = at::empty({group, prepared.height, prepared.width, items},
                                       logits.options().dtype(wide_dtype(logits)));
  problem.statistics = static_cast<CrossEntropyStatistics<T>*>(scratch.data_ptr());
  for (int64_t first = 0; first < batch; first += group) {
    problem.first_image = first;
    problem.images = std::min(group, batch - first);
    problem.blocks = column_blocks(problem.images, prepared.height, prepared.width);
    launch_cross_entropy_backward(problem, stream);
  }
}

template <class T>
at::Tensor backward(const at::Tensor& grad_loss, const Inputs& in, bool per_pixel) {
  const OnDeviceOf device(in.logits);
  Prepared<T> prepared = prepare<T>(in);
  CrossEntropyProblem<T>& problem = prepared.problem;
  at::Tensor gradient = at::empty(in.logits.sizes(), in.logits.options(), at::MemoryFormat::Contiguous);
  if (prepared.empty) return gradient;
  TORCH_CHECK_VALUE((per_pixel ? grad_loss.sizes() == in.target.sizes() : grad_loss.numel() == 1) &&
                        grad_loss.device() == in.logits.device(),
                    "grad_loss: expected ", per_pixel ? "the shape of target" : "one value",
                    " on ", in.logits.device(), ", found ", grad_loss.sizes(), " on ",
                    grad_loss.device());
  const at::Tensor upstream = grad_loss.to(wide_dtype(in.logits)).contiguous();
  problem.upstream = upstream.const_data_ptr<T>();
  problem.per_pixel = per_pixel;
  problem.gradient = gradient.data_ptr();
  const bool in_passes = problem.registers == 0 || problem.registers > kMostTransposed;
  if (!problem.grid.equal && in_passes) {
    backward_in_groups(prepared, in.logits, device.stream());
  } else {
    launch_cross_entropy_backward(problem, device.stream());
  }
  return gradient;
}

LossTensors masked_cross_entropy(
    const at::Tensor& logits, const at::Tensor& target, const OptionalTensor& confidence,
    double threshold, const OptionalTensor& ignore_mask, int64_t ignore_index,
    const OptionalTensor& class_weight, const OptionalTensor& boxes, const OptionalTensor& partner,
    bool per_pixel, bool align_corners, bool with_grad, int64_t mean_over) {
  const Inputs in{logits,       target,       confidence, threshold, ignore_mask,
                  ignore_index, class_weight, boxes,      partner,   align_corners};
  return logits.scalar_type() == at::kDouble ? forward<double>(in, per_pixel, with_grad, mean_over)
                                             : forward<float>(in, per_pixel, with_grad, mean_over);
}

at::Tensor masked_cross_entropy_backward(
    const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
    const OptionalTensor& confidence, double threshold, const OptionalTensor& ignore_mask,
    int64_t ignore_index, const OptionalTensor& class_weight, const OptionalTensor& boxes,
    const OptionalTensor& partner, bool per_pixel, bool align_corners, const at::Tensor& saved) {
  if (!per_pixel && saved.dim() == 4) return scaled(saved, grad_loss, logits);
  const Inputs in{logits,       target,       confidence, threshold, ignore_mask,
                  ignore_index, class_weight, boxes,      partner,   align_corners};
  return logits.scalar_type() == at::kDouble ? backward<double>(grad_loss, in, per_pixel)
                                             : backward<float>(grad_loss, in, per_pixel);
}

} // namespace

CO2S_CUDA_IMPL(m) {
  m.impl("masked_cross_entropy", &masked_cross_entropy);
  m.impl("masked_cross_entropy_backward", &masked_cross_entropy_backward);
}

} // namespace co2s::cuda
