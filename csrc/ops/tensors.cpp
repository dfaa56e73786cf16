#include "ops/tensors.h"

#include <ATen/Functions.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace co2s {
namespace {

MapView map_view(const at::Tensor& map, at::IntArrayRef shape, const at::Tensor& logits,
                 const char* name) {
  TORCH_CHECK_VALUE(map.sizes() == shape, name, ": expected shape ", shape, ", found ",
                    map.sizes());
  TORCH_CHECK_VALUE(map.device() == logits.device(), name, ": expected a tensor on ",
                    logits.device(), ", as the logits, found ", map.device());
  return {map.const_data_ptr(), dtype_of(map, name), map.stride(0), map.stride(1), map.stride(2)};
}

} // namespace

Dtype dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
  case at::kFloat: return Dtype::kFloat32;
  case at::kDouble: return Dtype::kFloat64;
  case at::kHalf: return Dtype::kFloat16;
  case at::kBFloat16: return Dtype::kBFloat16;
  case at::kByte: return Dtype::kUInt8;
  case at::kBool: return Dtype::kUInt8;
  case at::kInt: return Dtype::kInt32;
  case at::kLong: return Dtype::kInt64;
  default: TORCH_CHECK_TYPE(false, name, ": unsupported dtype ", tensor.scalar_type());
  }
}

at::Tensor scaled(const at::Tensor& saved, const at::Tensor& upstream, const at::Tensor& logits) {
  at::Tensor gradient =
      at::empty(saved.sizes(), logits.options(), at::MemoryFormat::Contiguous);
  at::mul_out(gradient, saved, upstream);
  return gradient;
}

LogitsView logits_view(const at::Tensor& logits, const char* name, at::DeviceType on) {
  TORCH_CHECK_VALUE(logits.dim() == 4, name, ": expected shape [B, K, h, w], found ",
                    logits.sizes());
  TORCH_CHECK_TYPE(logits.is_floating_point(), name,
                   ": expected float32, float64, float16 or bfloat16, found ",
                   logits.scalar_type());
  TORCH_CHECK_VALUE(logits.device().type() == on, name, ": expected a ", at::DeviceTypeName(on),
                    " tensor, found ", logits.device());
  TORCH_CHECK_VALUE(logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0, name,
                    ": expected at least one class, row and column, found ", logits.sizes());
  return {logits.const_data_ptr(), dtype_of(logits, name), logits.size(0),   logits.size(1),
          logits.size(2),          logits.size(3),         logits.stride(0), logits.stride(1),
          logits.stride(2),        logits.stride(3)};
}

MapView integer_map(const at::Tensor& map, at::IntArrayRef shape, const at::Tensor& logits,
                    const char* name) {
  const auto type = map.scalar_type();
  TORCH_CHECK_TYPE(type == at::kByte || type == at::kBool || type == at::kInt || type == at::kLong,
                   name, ": expected uint8, int32 or int64, found ", type);
  return map_view(map, shape, logits, name);
}

MapView float_map(const at::Tensor& map, at::IntArrayRef shape, const at::Tensor& logits,
                  const char* name) {
  const auto type = map.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, name,
                   ": expected float32 or float64, found ", type);
  return map_view(map, shape, logits, name);
}

BoxesView Boxes::view() const {
  if (!boxes.defined()) return {};
  return {boxes.const_data_ptr<int32_t>(), partner.const_data_ptr<int64_t>()};
}

Boxes checked_boxes(const OptionalTensor& boxes, const OptionalTensor& partner, int64_t batch,
                    const at::Tensor& with) {
  TORCH_CHECK_VALUE(boxes.has_value() == partner.has_value(),
                    "boxes and partner: expected both or none");
  if (!boxes.has_value()) return {};
  TORCH_CHECK_VALUE(boxes->dim() == 2 && boxes->size(0) == batch && boxes->size(1) == 4,
                    "boxes: expected shape [", batch, ", 4], found ", boxes->sizes());
  TORCH_CHECK_VALUE(partner->dim() == 1 && partner->size(0) == batch, "partner: expected shape [",
                    batch, "], found ", partner->sizes());
  TORCH_CHECK_TYPE(boxes->scalar_type() == at::kInt, "boxes: expected int32, found ",
                   boxes->scalar_type());
  TORCH_CHECK_TYPE(partner->scalar_type() == at::kLong, "partner: expected int64, found ",
                   partner->scalar_type());
  TORCH_CHECK_VALUE(boxes->device() == with.device() && partner->device() == with.device(),
                    "boxes and partner: expected tensors on ", with.device(), ", found ",
                    boxes->device(), " and ", partner->device());
  return {boxes->contiguous(), partner->contiguous()};
}

void check_partners(const Boxes& boxes) {
  if (!boxes.partner.defined()) return;
  const int64_t batch = boxes.partner.numel();
  const int64_t* images = boxes.partner.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_INDEX(images[b] >= 0 && images[b] < batch, "partner: ", images[b], " at image ", b,
                      " is outside [0, ", batch, ")");
  }
}

at::ScalarType wide_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_threshold(double threshold) {
  TORCH_CHECK_VALUE(threshold >= 0 && threshold <= 1, "threshold: expected a number in [0, 1], ",
                    "found ", threshold);
}

void check_size(int64_t height, int64_t width) {
  TORCH_CHECK_VALUE(height > 0 && width > 0, "height, width: expected positive numbers, found ",
                    height, ", ", width);
}

void check_mean_over(int64_t mean_over, bool per_pixel) {
  TORCH_CHECK_VALUE(mean_over >= -1 && mean_over < (per_pixel ? 0 : 2),
                    "mean_over: expected -1, 0 or 1, and -1 for a map, found ", mean_over);
}

void raise_bad_label(const BadLabel& bad, int64_t classes, int64_t ignore_index) {
  TORCH_CHECK_INDEX(!bad.found, "target: class ", bad.value, " at image ", bad.image, ", row ",
                    bad.row, ", column ", bad.column, " is outside [0, ", classes,
                    ") and is not ignore_index (", ignore_index, ")");
}

at::Tensor empty_for_writing(at::IntArrayRef shape, at::ScalarType dtype) {
  at::Tensor tensor = at::empty(shape, at::TensorOptions().dtype(dtype));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + tensor.nbytes()) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

} // namespace co2s
