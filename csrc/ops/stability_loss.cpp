#include "ops/stability_loss.h"

#include <torch/library.h>

#include <algorithm>

#include "ops/run_bands.h"

namespace co2s {
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

  const at::Tensor& logits(int which) const { return which == 0 ? logits_a : logits_b; }
};

struct Result {
  StabilityPartial sums;
  at::Tensor gradient[2];
};

void check_pair(const Inputs& in) {
  TORCH_CHECK_VALUE(in.logits_a.sizes() == in.logits_b.sizes(),
                    "logits_b: expected the shape of logits_a, ", in.logits_a.sizes(), ", found ",
                    in.logits_b.sizes());
  TORCH_CHECK_TYPE(wide_dtype(in.logits_a) == wide_dtype(in.logits_b),
                   "logits_b: expected the precision of logits_a, ", in.logits_a.scalar_type(),
                   ", found ", in.logits_b.scalar_type());
  check_threshold(in.threshold);
  check_size(in.height, in.width);
}

// Gradients where need[i], multiplied by scale[i], of dtype[i] on equal grids and wide otherwise.
template <class T>
Result run(const Inputs& in, const bool (&need)[2], const double (&scale)[2],
           const at::ScalarType (&dtype)[2]) {
  StabilityArgs<T> args{};
  args.logits[0] = logits_view(in.logits_a, "logits_a");
  args.logits[1] = logits_view(in.logits_b, "logits_b");
  check_pair(in);
  const LogitsView& view = args.logits[0];
  const int64_t shape[] = {view.batch, in.height, in.width};
  if (in.ignore_mask) args.ignore_mask = integer_map(*in.ignore_mask, shape, in.logits_a, "ignore_mask");
  args.ignore_index = in.ignore_index;
  args.threshold = in.threshold;
  const auto plan = make_upsampling_plan<T>(view.height, view.width, in.height, in.width,
                                            in.align_corners, need[0] || need[1]);
  args.plan = plan.view();

  GradientTensors tensors[2];
  for (int i = 0; i < 2; ++i) {
    args.scale[i] = static_cast<T>(scale[i]);
    if (!need[i]) continue;
    tensors[i] = new_gradient<T>(in.logits(i), args.plan, dtype[i]);
    args.gradient[i] = tensors[i].gradient.data_ptr();
    args.gradient_dtype[i] = dtype_of(tensors[i].gradient, "gradient");
    if (tensors[i].border.defined()) {
      args.border[i] = tensors[i].border.template mutable_data_ptr<T>();
    }
  }
  std::vector<StabilityPartial> partial(view.batch * args.plan.bands);
  args.partial = partial.data();
  run_bands(view.batch, args.plan, [&](int64_t begin, int64_t end) {
    CO2S_CALL_KERNEL(stability_loss, args, begin, end);
  });

  Result result;
  for (int i = 0; i < 2; ++i) {
    for (const StabilityPartial& part : partial) {
      result.sums.sum[i] += part.sum[i];
      result.sums.count[i] += part.count[i];
    }
    if (need[i]) add_borders(tensors[i], args.plan);
    result.gradient[i] = tensors[i].gradient;
  }
  return result;
}

Result run_wide(const Inputs& in, const bool (&need)[2], const double (&scale)[2],
                const at::ScalarType (&dtype)[2]) {
  return in.logits_a.scalar_type() == at::kDouble ? run<double>(in, need, scale, dtype)
                                                  : run<float>(in, need, scale, dtype);
}

PairTensors stability_loss(
    const at::Tensor& logits_a, const at::Tensor& logits_b, double threshold, int64_t height,
    int64_t width, const OptionalTensor& ignore_mask, int64_t ignore_index, bool align_corners,
    bool with_grad_a, bool with_grad_b, bool mean) {
  const Inputs in{logits_a,    logits_b,     threshold,    height, width,
                  ignore_mask, ignore_index, align_corners};
  const at::ScalarType wide = wide_dtype(logits_a);
  Result result = run_wide(in, {with_grad_a, with_grad_b}, {1, 1}, {wide, wide});
  const auto options = at::TensorOptions().dtype(wide);
  const auto exact = at::TensorOptions().dtype(at::kDouble);
  at::Tensor sums = at::empty({2}, exact), scale = at::empty({mean ? 2 : 0}, exact);
  at::Tensor counts = at::empty({2}, at::TensorOptions().dtype(at::kLong));
  for (int i = 0; i < 2; ++i) {
    double divisor = 1;
    if (mean) {
      const int64_t pixels = std::max<int64_t>(result.sums.count[i], 1);
      divisor = static_cast<double>(logits_a.size(1) * pixels);
      scale.mutable_data_ptr<double>()[i] = 1 / divisor;
    }
    sums.mutable_data_ptr<double>()[i] = result.sums.sum[i] / divisor;
    counts.mutable_data_ptr<int64_t>()[i] = result.sums.count[i];
    if (!result.gradient[i].defined()) result.gradient[i] = at::empty({0}, options);
  }
  return {sums.to(wide), counts, result.gradient[0], result.gradient[1], scale.to(wide)};
}

std::tuple<at::Tensor, at::Tensor> stability_loss_backward(
    const at::Tensor& grad_sums, const at::Tensor& logits_a, const at::Tensor& logits_b,
    double threshold, int64_t height, int64_t width, const OptionalTensor& ignore_mask,
    int64_t ignore_index, bool align_corners, bool need_a, bool need_b, const at::Tensor& saved_a,
    const at::Tensor& saved_b) {
  const Inputs in{logits_a,    logits_b,     threshold,    height, width,
                  ignore_mask, ignore_index, align_corners};
  TORCH_CHECK_VALUE(grad_sums.dim() == 1 && grad_sums.size(0) == 2,
                    "grad_sums: expected shape [2], found ", grad_sums.sizes());
  const at::ScalarType dtype[] = {logits_a.scalar_type(), logits_b.scalar_type()};
  const at::Tensor saved[] = {saved_a, saved_b};
  const bool need[] = {need_a, need_b};
  const bool redo[] = {need_a && saved_a.dim() != 4, need_b && saved_b.dim() != 4};
  at::Tensor gradient[2];
  if (redo[0] || redo[1]) {
    const at::Tensor scale = grad_sums.to(at::kDouble).contiguous();
    const double* values = scale.const_data_ptr<double>();
    Result result = run_wide(in, redo, {values[0], values[1]}, dtype);
    gradient[0] = result.gradient[0];
    gradient[1] = result.gradient[1];
  }
  for (int i = 0; i < 2; ++i) {
    if (need[i] && !redo[i]) gradient[i] = scaled(saved[i], grad_sums.select(0, i), in.logits(i));
    gradient[i] = gradient[i].defined()
                      ? gradient[i].to(dtype[i])
                      : at::empty({0}, at::TensorOptions().dtype(dtype[i]));
  }
  return {gradient[0], gradient[1]};
}

} // namespace

TORCH_LIBRARY_IMPL(co2s_native, CPU, m) {
  m.impl("stability_loss", &stability_loss);
  m.impl("stability_loss_backward", &stability_loss_backward);
}

} // namespace co2s
