#include "ops/cuda/arguments.h"

#include <algorithm>
#include <limits>

namespace co2s::cuda {
namespace {

constexpr int64_t kScratchBytes = int64_t(64) << 20;

bool on_cuda(const at::Tensor& tensor) {
#if defined(CO2S_EMULATE_CUDA)
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

MapView map_on_device(const at::Tensor& map, at::IntArrayRef shape, const at::Tensor& logits,
                      const char* name) {
  TORCH_CHECK_VALUE(map.sizes() == shape, name, ": expected shape ", shape, ", found ",
                    map.sizes());
  TORCH_CHECK_VALUE(map.device() == logits.device(), name, ": expected a tensor on ",
                    logits.device(), ", as the logits, found ", map.device());
  return {map.const_data_ptr(), dtype_of(map, name), map.stride(0), map.stride(1), map.stride(2)};
}

int64_t item_size(Dtype dtype) {
  switch (dtype) {
  case Dtype::kUInt8: return 1;
  case Dtype::kFloat16:
  case Dtype::kBFloat16: return 2;
  case Dtype::kFloat32:
  case Dtype::kInt32: return 4;
  default: return 8;
  }
}

bool starts_at_multiple_of(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0;
}

} // namespace

LogitsView logits_on_device(const at::Tensor& logits, const char* name) {
  TORCH_CHECK_VALUE(logits.dim() == 4, name, ": expected shape [B, K, h, w], found ",
                    logits.sizes());
  TORCH_CHECK_TYPE(logits.is_floating_point(), name,
                   ": expected float32, float64, float16 or bfloat16, found ",
                   logits.scalar_type());
  TORCH_CHECK_VALUE(on_cuda(logits), name, ": expected a CUDA tensor, found ", logits.device());
  TORCH_CHECK_VALUE(logits.size(1) > 0 && logits.size(2) > 0 && logits.size(3) > 0, name,
                    ": expected at least one class, row and column, found ", logits.sizes());
  return {logits.const_data_ptr(), dtype_of(logits, name), logits.size(0),   logits.size(1),
          logits.size(2),          logits.size(3),         logits.stride(0), logits.stride(1),
          logits.stride(2),        logits.stride(3)};
}

MapView integers_on_device(const at::Tensor& map, at::IntArrayRef shape, const at::Tensor& logits,
                           const char* name) {
  const auto type = map.scalar_type();
  TORCH_CHECK_TYPE(type == at::kByte || type == at::kBool || type == at::kInt || type == at::kLong,
                   name, ": expected uint8, int32 or int64, found ", type);
  return map_on_device(map, shape, logits, name);
}

MapView floats_on_device(const at::Tensor& map, at::IntArrayRef shape, const at::Tensor& logits,
                         const char* name) {
  const auto type = map.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, name,
                   ": expected float32 or float64, found ", type);
  return map_on_device(map, shape, logits, name);
}

Boxes boxes_on_device(const OptionalTensor& boxes, const OptionalTensor& partner, int64_t batch,
                      const at::Tensor& on) {
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
  TORCH_CHECK_VALUE(boxes->device() == on.device() && partner->device() == on.device(),
                    "boxes and partner: expected tensors on ", on.device(), ", found ",
                    boxes->device(), " and ", partner->device());
  return {boxes->contiguous(), partner->contiguous()};
}

void check_extent(const LogitsView& logits, int64_t height, int64_t width) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(height < kMost / width && logits.height < kMost / logits.width &&
                        logits.classes < kMost,
                    "logits: the CUDA kernels take fewer than 2^31 pixels an image, found ", height,
                    " x ", width, " from ", logits.height, " x ", logits.width);
}

int32_t aligned_pixels(const PixelMaps& maps, int64_t height) {
  int32_t aligned = 16;
  for (const MapView& map : {maps.target, maps.confidence, maps.ignore_mask}) {
    if (map.data == nullptr) continue;
    if (map.stride_x != 1 || (height > 1 && map.stride_y != maps.width)) return 1;
    const bool half_read = map.dtype == Dtype::kFloat64; // confidences: read one by one
    if (half_read) return 1;
    while (aligned > 1 &&
           (map.stride_b % aligned != 0 ||
            !starts_at_multiple_of(map.data, std::min<int64_t>(16, aligned * item_size(map.dtype))))) {
      aligned /= 2;
    }
  }
  return aligned;
}

bool are_flat(const PixelMaps& maps, int64_t batch, int64_t height) {
  const int64_t image = height * maps.width;
  if (batch > std::numeric_limits<int32_t>::max() / image) return false;
  for (const MapView& map : {maps.target, maps.confidence, maps.ignore_mask}) {
    if (map.data == nullptr) continue;
    if (map.stride_x != 1 || (height > 1 && map.stride_y != maps.width)) return false;
    if ((batch > 1 && map.stride_b != image) || map.dtype == Dtype::kFloat64) return false;
  }
  return true;
}

bool has_vectors(const LogitsView& logits, int64_t length) {
  const int64_t bytes = length * item_size(logits.dtype);
  return length > 1 && logits.stride_x == 1 &&
         (logits.height == 1 || logits.stride_y == logits.width) &&
         (logits.height * logits.width) % length == 0 && logits.stride_k % length == 0 &&
         logits.stride_b % length == 0 && starts_at_multiple_of(logits.data, bytes);
}

Choice choose(const LogitsView* logits, int students, bool equal, int64_t batch, int64_t height,
              int64_t width) {
  Choice choice{registers_for(logits[0].classes), {}};
  if (logits[0].dtype == Dtype::kFloat64) choice.registers = 0;
  if (!equal) {
    choice.blocks = column_blocks(batch, height, width);
    return choice;
  }
  const int64_t item = item_size(logits[0].dtype);
  const int64_t bytes = vector_bytes(choice.registers, students, static_cast<int>(item));
  int64_t length = choice.registers > 0 ? bytes / item : 1;
  for (int i = 0; i < students; ++i) {
    if (length > 1 && !has_vectors(logits[i], length)) choice.registers = 0;
    // A vector of one pixel needs no alignment, but a flat image.
    if (length == 1 && (logits[i].stride_x != 1 || logits[i].stride_y != logits[i].width)) {
      choice.registers = 0;
    }
  }
  if (choice.registers == 0) length = 1;
  choice.blocks = equal_blocks(batch, height * width / length);
  return choice;
}

at::Tensor new_partials(int64_t blocks, const at::Tensor& on) {
  static_assert(sizeof(Partial) == 4 * sizeof(int64_t));
  return at::empty({std::max<int64_t>(blocks, 1), 4}, on.options().dtype(at::kLong));
}

int64_t images_at_once(int64_t batch, int64_t height, int64_t width, int64_t bytes_a_pixel) {
  const int64_t fitting = kScratchBytes / (height * width * bytes_a_pixel);
  return std::clamp<int64_t>(fitting, 1, std::max<int64_t>(batch, 1));
}

} // namespace co2s::cuda
