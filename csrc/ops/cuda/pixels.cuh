// Which pixels take part, and with which class.
#pragma once

#include "ops/cuda/logits.cuh"

namespace co2s::cuda {

// The box of one image; empty where there is none or its partner is not in the batch.
struct Mix {
  int32_t box[4];
  int64_t partner;
};

__device__ __forceinline__ Mix load_mix(const BoxesView& boxes, int64_t batch, int64_t image) {
  Mix mix{{0, 0, 0, 0}, image};
  if (boxes.boxes == nullptr) return mix;
  const int64_t partner = boxes.partner[image];
  const bool exists = partner >= 0 && partner < batch;
  for (int i = 0; i < 4; ++i) { // read beside the partner, not after it
    const int32_t edge = boxes.boxes[4 * image + i];
    mix.box[i] = exists ? edge : 0;
  }
  mix.partner = exists ? partner : image;
  return mix;
}

struct PixelLabel {
  int32_t label; // the class, kNotTaken where the pixel is not taken
  bool valid;
};

__device__ __forceinline__ int64_t read_integer(const MapView& map, int64_t offset) {
  switch (map.dtype) {
  case Dtype::kInt64: return static_cast<const int64_t*>(map.data)[offset];
  case Dtype::kInt32: return static_cast<const int32_t*>(map.data)[offset];
  default: return static_cast<const uint8_t*>(map.data)[offset];
  }
}

__device__ __forceinline__ int64_t offset_in(const MapView& map, int64_t image, int32_t y,
                                             int32_t x) {
  return image * map.stride_b + y * map.stride_y + x * map.stride_x;
}

// Compared in the confidence's own dtype, as torch compares with a number.
__device__ __forceinline__ bool is_sure(const PixelMaps& maps, int64_t offset) {
  if (maps.confidence.dtype == Dtype::kFloat64) {
    return static_cast<const double*>(maps.confidence.data)[offset] >= maps.threshold;
  }
  return static_cast<const float*>(maps.confidence.data)[offset] >= maps.float_threshold;
}

// A class outside [0, K) does not count: looking for one would need a host synchronisation.
__device__ __forceinline__ PixelLabel read_pixel(const PixelMaps& maps, const Mix& mix,
                                                 int64_t image, int32_t y, int32_t x) {
  const int64_t source = inside_box(mix.box, y, x) ? mix.partner : image;
  int32_t label = checked_label(read_integer(maps.target, offset_in(maps.target, source, y, x)),
                                maps.classes, maps.ignore_index);
  bool valid = label >= 0;
  if (valid && maps.ignore_mask.data != nullptr) {
    valid = read_integer(maps.ignore_mask, offset_in(maps.ignore_mask, source, y, x)) !=
            maps.ignore_index;
  }
  bool taken = valid;
  if (valid && maps.confidence.data != nullptr) {
    taken = is_sure(maps, offset_in(maps.confidence, source, y, x));
  }
  return {taken ? label : kNotTaken, valid};
}

// Whether the ignore mask, if there is one, lets the pixel count.
__device__ __forceinline__ bool is_unmasked(const PixelMaps& maps, int64_t image, int32_t y,
                                            int32_t x) {
  return maps.ignore_mask.data == nullptr ||
         read_integer(maps.ignore_mask, offset_in(maps.ignore_mask, image, y, x)) !=
             maps.ignore_index;
}

template <class S, int V>
__device__ __forceinline__ Pack<S, V> read_pack(const MapView& map, int64_t offset) {
  constexpr int kAtOnce = V * sizeof(S) > 16 ? 16 / static_cast<int>(sizeof(S)) : V;
  Pack<S, V> all;
#pragma unroll
  for (int begin = 0; begin < V; begin += kAtOnce) {
    const auto part = *reinterpret_cast<const Pack<S, kAtOnce>*>(static_cast<const S*>(map.data) +
                                                                 offset + begin);
#pragma unroll
    for (int v = 0; v < kAtOnce; ++v) all.value[begin + v] = part.value[v];
  }
  return all;
}

template <int V, class F>
__device__ __forceinline__ void with_integers(const MapView& map, int64_t offset, F f) {
  switch (map.dtype) {
  case Dtype::kInt64: f(read_pack<int64_t, V>(map, offset)); break;
  case Dtype::kInt32: f(read_pack<int32_t, V>(map, offset)); break;
  default: f(read_pack<uint8_t, V>(map, offset));
  }
}

template <int V>
__device__ __forceinline__ void apply_confidence(const PixelMaps& maps, int64_t offset,
                                                 PixelLabel (&labels)[V]) {
  const auto sure = read_pack<float, V>(maps.confidence, offset);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    labels[v].label = sure.value[v] >= maps.float_threshold ? labels[v].label : kNotTaken;
  }
}

// All V pixels from one image, in maps without gaps.
template <int V>
__device__ __forceinline__ void read_aligned_pixels(const PixelMaps& maps, int64_t source,
                                                    int32_t pixel, PixelLabel (&labels)[V]) {
  with_integers<V>(maps.target, source * maps.target.stride_b + pixel, [&](const auto& values) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int32_t label = checked_label(values.value[v], maps.classes, maps.ignore_index);
      labels[v] = {label >= 0 ? label : kNotTaken, label >= 0};
    }
  });
  if (maps.ignore_mask.data != nullptr) {
    with_integers<V>(maps.ignore_mask, source * maps.ignore_mask.stride_b + pixel,
                     [&](const auto& values) {
#pragma unroll
                       for (int v = 0; v < V; ++v) {
                         if (static_cast<int64_t>(values.value[v]) == maps.ignore_index) {
                           labels[v] = {kNotTaken, false};
                         }
                       }
                     });
  }
  if (maps.confidence.data != nullptr) {
    apply_confidence<V>(maps, source * maps.confidence.stride_b + pixel, labels);
  }
}

template <int V>
__device__ __forceinline__ void read_pixels(const PixelMaps& maps, const VectorPosition& at,
                                            PixelLabel (&labels)[V]) {
  const Mix mix = load_mix(maps.mix, maps.batch, at.image);
  if constexpr (V > 1) {
    // How many pixels of the vector lie in the box; unknown (-1) where it spans two rows.
    const int64_t begin = mix.box[0] > at.x ? mix.box[0] : at.x;
    const int64_t end = mix.box[2] < at.x + V ? mix.box[2] : at.x + V;
    const bool in_rows = at.y >= mix.box[1] && at.y < mix.box[3];
    int64_t inside = in_rows && end > begin ? end - begin : 0;
    if (at.x + V > maps.width && mix.box[2] > mix.box[0]) inside = -1;
    if (maps.aligned % V == 0 && (inside == 0 || inside == V)) {
      read_aligned_pixels<V>(maps, inside > 0 ? mix.partner : at.image, at.pixel, labels);
      return;
    }
  }
  int32_t y = at.y, x = at.x;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    labels[v] = read_pixel(maps, mix, at.image, y, x);
    if (++x == maps.width) {
      x = 0;
      ++y;
    }
  }
}

template <int V>
__device__ __forceinline__ void read_unmasked(const PixelMaps& maps, const VectorPosition& at,
                                              bool (&unmasked)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) unmasked[v] = true;
  if (maps.ignore_mask.data == nullptr) return;
  if (maps.aligned % V == 0) {
    with_integers<V>(maps.ignore_mask, at.image * maps.ignore_mask.stride_b + at.pixel,
                     [&](const auto& values) {
#pragma unroll
                       for (int v = 0; v < V; ++v) {
                         unmasked[v] =
                             static_cast<int64_t>(values.value[v]) != maps.ignore_index;
                       }
                     });
    return;
  }
  int32_t y = at.y, x = at.x;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    unmasked[v] = is_unmasked(maps, at.image, y, x);
    if (++x == maps.width) {
      x = 0;
      ++y;
    }
  }
}

} // namespace co2s::cuda
