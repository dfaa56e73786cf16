// Pixels of a column, read kAhead rows at a time: one after the other, each would wait for memory.
#pragma once

#include "ops/cuda/pixels.cuh"

namespace co2s::cuda {

constexpr int kAhead = 4;

// What a column keeps of a pixel: its class where it is taken, or kNotTaken where it is not valid,
// or this where it is valid and not taken.
constexpr int32_t kUnsure = -3;

CO2S_HD bool is_valid(int32_t code) { return code != kNotTaken; }
CO2S_HD bool is_taken(int32_t code) { return code >= 0; }

// value[i] = map at offset[i]. One branch on the dtype, so that all reads are under way together.
__device__ __forceinline__ void read_integers(const MapView& map, const int32_t (&offset)[kAhead],
                                              int64_t (&value)[kAhead]) {
  const auto read = [&](const auto* data) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) value[i] = data[offset[i]];
  };
  switch (map.dtype) {
  case Dtype::kInt64: read(static_cast<const int64_t*>(map.data)); break;
  case Dtype::kInt32: read(static_cast<const int32_t*>(map.data)); break;
  default: read(static_cast<const uint8_t*>(map.data));
  }
}

// Where flat maps hold the rows from `y` on of column `x`, below the last row that row again.
__device__ __forceinline__ void rows_ahead(const PixelMaps& maps, int64_t image, int32_t y,
                                           int32_t x, int32_t height, int32_t (&offset)[kAhead]) {
  const int32_t first = static_cast<int32_t>(image) * height * maps.width + x;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) offset[i] = first + smaller(y + i, height - 1) * maps.width;
}

// The pixels that read_pixel finds, going down a column.
class LabelColumn {
public:
  __device__ __forceinline__ void start() { left_ = 0; }

  // The code of row `y`; `height` rows there are. Rows follow each other from the first call on.
  __device__ __forceinline__ int32_t next(const PixelMaps& maps, const Mix& mix, int64_t image,
                                          int32_t y, int32_t x, int32_t height) {
    if (left_ == 0) {
      if (maps.flat) {
        read_flat(maps, mix, image, y, x, height);
      } else {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const PixelLabel pixel = read_pixel(maps, mix, image, smaller(y + i, height - 1), x);
          ahead_[i] = pixel.label >= 0 ? pixel.label : (pixel.valid ? kUnsure : kNotTaken);
        }
      }
      left_ = kAhead;
    }
    const int32_t code = ahead_[0];
#pragma unroll
    for (int i = 1; i < kAhead; ++i) ahead_[i - 1] = ahead_[i]; // registers have no index
    --left_;
    return code;
  }

private:
  __device__ __forceinline__ void read_flat(const PixelMaps& maps, const Mix& mix, int64_t image,
                                            int32_t y, int32_t x, int32_t height) {
    int32_t offset[kAhead];
    rows_ahead(maps, image, y, x, height, offset);
    if (x >= mix.box[0] && x < mix.box[2]) {
      const int32_t to_partner = static_cast<int32_t>(mix.partner - image) * height * maps.width;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int32_t row = smaller(y + i, height - 1);
        offset[i] += row >= mix.box[1] && row < mix.box[3] ? to_partner : 0;
      }
    }
    int64_t target[kAhead], ignore[kAhead];
    float confidence[kAhead];
    read_integers(maps.target, offset, target);
    if (maps.ignore_mask.data != nullptr) read_integers(maps.ignore_mask, offset, ignore);
    if (maps.confidence.data != nullptr) {
      const auto* data = static_cast<const float*>(maps.confidence.data);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) confidence[i] = data[offset[i]];
    }
    const auto classes = static_cast<uint64_t>(maps.classes);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      bool valid = static_cast<uint64_t>(target[i]) < classes && target[i] != maps.ignore_index;
      if (maps.ignore_mask.data != nullptr) valid = valid && ignore[i] != maps.ignore_index;
      const bool sure = maps.confidence.data == nullptr || confidence[i] >= maps.float_threshold;
      ahead_[i] = valid ? (sure ? static_cast<int32_t>(target[i]) : kUnsure) : kNotTaken;
    }
  }

  int32_t ahead_[kAhead], left_;
};

// What is_unmasked says, going down a column.
class MaskColumn {
public:
  __device__ __forceinline__ void start() { left_ = 0; }

  __device__ __forceinline__ bool next(const PixelMaps& maps, int64_t image, int32_t y, int32_t x,
                                       int32_t height) {
    if (maps.ignore_mask.data == nullptr) return true;
    if (left_ == 0) {
      unmasked_ = 0;
      if (maps.flat) {
        int32_t offset[kAhead];
        int64_t ignore[kAhead];
        rows_ahead(maps, image, y, x, height, offset);
        read_integers(maps.ignore_mask, offset, ignore);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          unmasked_ |= static_cast<uint32_t>(ignore[i] != maps.ignore_index) << i;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const bool found = is_unmasked(maps, image, smaller(y + i, height - 1), x);
          unmasked_ |= static_cast<uint32_t>(found) << i;
        }
      }
      left_ = kAhead;
    }
    const bool first = (unmasked_ & 1u) != 0;
    unmasked_ >>= 1;
    --left_;
    return first;
  }

private:
  uint32_t unmasked_; // a bit a row
  int32_t left_;
};

} // namespace co2s::cuda
