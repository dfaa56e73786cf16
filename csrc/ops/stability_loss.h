// stability_loss: what the kernels are given. A task is one band of one image.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/upsampling_plan.h"
#include "ops/views.h"

namespace co2s {

// Outcome of one task, for student a and student b; tasks are added in their order.
struct StabilityPartial {
  double sum[2] = {0, 0};
  int64_t count[2] = {0, 0};
};

template <class T> struct StabilityArgs {
  LogitsView logits[2];
  PlanView<T> plan;
  MapView ignore_mask; // [B,H,W]
  int64_t ignore_index;
  double threshold;
  T scale[2];           // multiplies the gradient
  void* gradient[2];    // contiguous [B,K,h,w] or null; zero at first unless equal grids
  Dtype gradient_dtype[2];
  T* border[2];         // [B,bands,K,w], for the gradient on unequal grids
  StabilityPartial* partial; // [B * bands]
};

CO2S_DECLARE_KERNEL(stability_loss, const StabilityArgs<float>&, int64_t begin, int64_t end)
CO2S_DECLARE_KERNEL(stability_loss, const StabilityArgs<double>&, int64_t begin, int64_t end)

} // namespace co2s
