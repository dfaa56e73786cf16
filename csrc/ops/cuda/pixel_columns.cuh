// Pixels of a column, read kAhead rows at a time: one after the other, each would wait for memory.
#pragma once

#include "ops/cuda/pixels.cuh"

namespace co2s::cuda {

constexpr int kAhead = 4;

// value[i] = map at offset[i]. One branch on the dtype, so that all reads are under way together.
__device__ __forceinline__ void read_integers(const MapView& map, const int64_t (&offset)[kAhead],
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

__device__ __forceinline__ void are_sure(const PixelMaps& maps, const int64_t (&offset)[kAhead],
                                         bool (&sure)[kAhead]) {
  const auto compare = [&](const auto* data, auto threshold) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sure[i] = data[offset[i]] >= threshold;
  };
  if (maps.confidence.dtype == Dtype::kFloat64) {
    compare(static_cast<const double*>(maps.confidence.data), maps.threshold);
  } else {
    compare(static_cast<const float*>(maps.confidence.data), static_cast<float>(maps.threshold));
  }
}

// The rows from `y` on of column `x`, below the last row that row again; through the box, each of
// the image it is read from.
struct RowsAhead {
  int32_t row[kAhead];
  bool inside[kAhead];

  __device__ __forceinline__ RowsAhead(const Mix& mix, int32_t y, int32_t x, int32_t height) {
    const bool in_columns = x >= mix.box[0] && x < mix.box[2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      row[i] = smaller(y + i, height - 1);
      inside[i] = in_columns && row[i] >= mix.box[1] && row[i] < mix.box[3];
    }
  }

  __device__ __forceinline__ void offsets_in(const MapView& map, const Mix& mix, int64_t image,
                                             int32_t x, int64_t (&offset)[kAhead]) const {
    const int64_t own = image * map.stride_b + x * map.stride_x;
    const int64_t other = mix.partner * map.stride_b + x * map.stride_x;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      offset[i] = (inside[i] ? other : own) + row[i] * map.stride_y;
    }
  }
};

// What has been read of a column and not yet been asked for. Shifted, since registers have no index.
template <class Item> struct RowQueue {
  Item ahead[kAhead];
  int32_t left;

  __device__ __forceinline__ void start() { left = 0; }

  __device__ __forceinline__ Item take() {
    const Item first = ahead[0];
#pragma unroll
    for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
    --left;
    return first;
  }
};

// The pixels that read_pixel finds, going down a column.
struct LabelColumn : RowQueue<PixelLabel> {
  // Of row `y`; `height` rows there are. Rows follow each other from the first call on.
  __device__ __forceinline__ PixelLabel next(const PixelMaps& maps, const Mix& mix, int64_t image,
                                             int32_t y, int32_t x, int32_t height) {
    if (left == 0) {
      read(maps, mix, image, y, x, height);
      left = kAhead;
    }
    return take();
  }

private:
  __device__ __forceinline__ void read(const PixelMaps& maps, const Mix& mix, int64_t image,
                                       int32_t y, int32_t x, int32_t height) {
    const RowsAhead rows(mix, y, x, height);
    int64_t offset[kAhead], target[kAhead], ignore[kAhead];
    bool sure[kAhead];
    rows.offsets_in(maps.target, mix, image, x, offset);
    read_integers(maps.target, offset, target);
    if (maps.ignore_mask.data != nullptr) {
      rows.offsets_in(maps.ignore_mask, mix, image, x, offset);
      read_integers(maps.ignore_mask, offset, ignore);
    }
    if (maps.confidence.data != nullptr) {
      rows.offsets_in(maps.confidence, mix, image, x, offset);
      are_sure(maps, offset, sure);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int32_t label = checked_label(target[i], maps.classes, maps.ignore_index);
      bool valid = label >= 0;
      if (maps.ignore_mask.data != nullptr) valid = valid && ignore[i] != maps.ignore_index;
      bool taken = valid;
      if (maps.confidence.data != nullptr) taken = taken && sure[i];
      ahead[i] = {taken ? label : kNotTaken, valid};
    }
  }
};

// What is_unmasked says, going down a column.
struct MaskColumn : RowQueue<bool> {
  __device__ __forceinline__ bool next(const PixelMaps& maps, int64_t image, int32_t y, int32_t x,
                                       int32_t height) {
    if (maps.ignore_mask.data == nullptr) return true;
    if (left == 0) {
      const Mix none{{0, 0, 0, 0}, image};
      int64_t offset[kAhead], ignore[kAhead];
      RowsAhead(none, y, x, height).offsets_in(maps.ignore_mask, none, image, x, offset);
      read_integers(maps.ignore_mask, offset, ignore);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) ahead[i] = ignore[i] != maps.ignore_index;
      left = kAhead;
    }
    return take();
  }
};

} // namespace co2s::cuda
