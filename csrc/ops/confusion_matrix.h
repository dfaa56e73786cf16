// confusion_matrix: what the kernels are given. A task is one band of one image.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/upsampling_plan.h"
#include "ops/views.h"

namespace co2s {

template <class T> struct ConfusionArgs {
  LogitsView logits;
  PlanView<T> plan;
  MapView target; // [B,H,W]
  int64_t ignore_index;
  BadLabel* bad; // [B * bands]
};

// Adds to counts [K,K], which belongs to the calling thread.
CO2S_DECLARE_KERNEL(confusion_matrix, const ConfusionArgs<float>&, int64_t begin, int64_t end,
                    int64_t* counts)
CO2S_DECLARE_KERNEL(confusion_matrix, const ConfusionArgs<double>&, int64_t begin, int64_t end,
                    int64_t* counts)

} // namespace co2s
