#include "ops/cuda/arguments.h"

#include <algorithm>
#include <limits>

namespace co2s::cuda {
namespace {

constexpr int64_t kScratchBytes = int64_t(64) << 20;

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
