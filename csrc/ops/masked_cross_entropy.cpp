#include "ops/masked_cross_entropy.h"

#include <torch/library.h>

#include <algorithm>

#include "ops/run_bands.h"

namespace co2s {
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

struct Sums {
  double loss = 0;
  int64_t valid = 0, taken = 0;
};

// Views into the inputs, and whatever contiguous copies they point into.
template <class T> class Problem {
public:
  Problem(const Inputs& in, bool with_gradient) : in_(in) {
    check_threshold(in.threshold);
    args.logits = logits_view(in.logits, "logits");
    TORCH_CHECK_VALUE(in.target.dim() == 3, "target: expected shape [B, H, W], found ",
                      in.target.sizes());
    const int64_t shape[] = {args.logits.batch, in.target.size(1), in.target.size(2)};
    args.target = integer_map(in.target, shape, in.logits, "target");
    check_size(shape[1], shape[2]);
    if (in.confidence) {
      args.confidence = float_map(*in.confidence, shape, in.logits, "confidence");
    }
    if (in.ignore_mask) {
      args.ignore_mask = integer_map(*in.ignore_mask, shape, in.logits, "ignore_mask");
    }
    boxes_ = checked_boxes(in.boxes, in.partner, args.logits.batch, in.logits);
    check_partners(boxes_);
    args.mix = boxes_.view();
    set_class_weight();
    args.ignore_index = in.ignore_index;
    args.threshold = in.threshold;
    plan_ = make_upsampling_plan<T>(args.logits.height, args.logits.width, shape[1], shape[2],
                                    in.align_corners, with_gradient);
    args.plan = plan_.view();
    args.scale = T(1);
  }

  GradientTensors want_gradient(at::ScalarType dtype) {
    GradientTensors tensors = new_gradient<T>(in_.logits, args.plan, dtype);
    args.gradient = tensors.gradient.data_ptr();
    args.gradient_dtype = dtype_of(tensors.gradient, "gradient");
    if (tensors.border.defined()) args.border = tensors.border.template mutable_data_ptr<T>();
    return tensors;
  }

  Sums run() {
    const int64_t batch = args.logits.batch;
    std::vector<CrossEntropyPartial> partial(batch * args.plan.bands);
    args.partial = partial.data();
    run_bands(batch, args.plan, [&](int64_t begin, int64_t end) {
      CO2S_CALL_KERNEL(masked_cross_entropy, args, begin, end);
    });
    Sums sums;
    for (const CrossEntropyPartial& part : partial) {
      raise_bad_label(part.bad, args.logits.classes, args.ignore_index);
      sums.loss += part.loss;
      sums.valid += part.valid;
      sums.taken += part.taken;
    }
    return sums;
  }

  CrossEntropyArgs<T> args{};

private:
  void set_class_weight() {
    if (!in_.class_weight) return;
    const at::Tensor& weight = *in_.class_weight;
    TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == args.logits.classes,
                      "class_weight: expected shape [", args.logits.classes, "], found ",
                      weight.sizes());
    class_weight_ = weight.to(wide_dtype(in_.logits)).contiguous();
    args.class_weight = class_weight_.template const_data_ptr<T>();
  }

  Inputs in_;
  Boxes boxes_;
  at::Tensor class_weight_;
  UpsamplingPlan<T> plan_;
};

at::Tensor counts_tensor(const Sums& sums) {
  at::Tensor counts = at::empty({2}, at::TensorOptions().dtype(at::kLong));
  counts.mutable_data_ptr<int64_t>()[0] = sums.valid;
  counts.mutable_data_ptr<int64_t>()[1] = sums.taken;
  return counts;
}

template <class T>
LossTensors forward(const Inputs& in, bool per_pixel, bool with_grad, int64_t mean_over) {
  check_mean_over(mean_over, per_pixel);
  const auto wide = at::TensorOptions().dtype(wide_dtype(in.logits));
  const bool save = with_grad && !per_pixel;
  Problem<T> problem(in, save);
  at::Tensor loss = per_pixel ? at::zeros(in.target.sizes(), wide) : at::empty({}, wide);
  if (per_pixel) problem.args.loss_map = loss.mutable_data_ptr<T>();
  GradientTensors tensors{at::empty({0}, wide), {}};
  if (save) tensors = problem.want_gradient(wide_dtype(in.logits));
  const Sums sums = problem.run();
  if (save) add_borders(tensors, problem.args.plan);
  at::Tensor scale = at::empty({0}, wide);
  double divisor = 1;
  if (mean_over >= 0) {
    divisor = static_cast<double>(std::max<int64_t>(mean_over == 0 ? sums.valid : sums.taken, 1));
    scale = at::scalar_tensor(1 / divisor, wide);
  }
  if (!per_pixel) *loss.mutable_data_ptr<T>() = static_cast<T>(sums.loss / divisor);
  return {loss, counts_tensor(sums), tensors.gradient, scale};
}

template <class T>
at::Tensor backward(const at::Tensor& grad_loss, const Inputs& in, bool per_pixel) {
  Problem<T> problem(in, true);
  at::Tensor upstream;
  if (per_pixel) {
    TORCH_CHECK_VALUE(grad_loss.sizes() == in.target.sizes(), "grad_loss: expected shape ",
                      in.target.sizes(), ", found ", grad_loss.sizes());
    upstream = grad_loss.to(wide_dtype(in.logits)).contiguous();
    problem.args.upstream = upstream.const_data_ptr<T>();
  } else {
    problem.args.scale = static_cast<T>(grad_loss.item<double>());
  }
  const GradientTensors tensors = problem.want_gradient(in.logits.scalar_type());
  problem.run();
  add_borders(tensors, problem.args.plan);
  return tensors.gradient.to(in.logits.scalar_type());
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

TORCH_LIBRARY_IMPL(co2s_native, CPU, m) {
  m.impl("masked_cross_entropy", &masked_cross_entropy);
  m.impl("masked_cross_entropy_backward", &masked_cross_entropy_backward);
}

} // namespace co2s
