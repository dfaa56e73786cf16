// Plain descriptions of tensors, so that the kernels need no torch header.
#pragma once

#include <cstdint>

namespace co2s {

enum class Dtype : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16, kUInt8, kInt32, kInt64 };

// logits [B,K,h,w], any strides (in elements).
struct LogitsView {
  const void* data;
  Dtype dtype;
  int64_t batch, classes, height, width;
  int64_t stride_b, stride_k, stride_y, stride_x;
};

// A map [B,H,W], any strides; data null when the argument was not given.
struct MapView {
  const void* data = nullptr;
  Dtype dtype = Dtype::kUInt8;
  int64_t stride_b = 0, stride_y = 0, stride_x = 0;
};

// boxes int32 [B,4] and partner int64 [B], contiguous; null when not given.
struct BoxesView {
  const int32_t* boxes = nullptr;
  const int64_t* partner = nullptr;
};

// The first pixel whose class is outside [0, K), in the order of the tasks.
struct BadLabel {
  bool found = false;
  int64_t value = 0, image = 0, row = 0, column = 0;
};

} // namespace co2s
