// softmax_confidence: what the kernels are given. A task is one band of one image.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/upsampling_plan.h"
#include "ops/views.h"

namespace co2s {

template <class T> struct ConfidenceArgs {
  LogitsView logits;
  PlanView<T> plan;
  T* confidence;       // contiguous [B,H,W]
  int64_t* label;      // contiguous [B,H,W]; null: see byte_label
  uint8_t* byte_label; // contiguous [B,H,W]
};

CO2S_DECLARE_KERNEL(softmax_confidence, const ConfidenceArgs<float>&, int64_t begin, int64_t end)
CO2S_DECLARE_KERNEL(softmax_confidence, const ConfidenceArgs<double>&, int64_t begin, int64_t end)

} // namespace co2s
