// masked_cross_entropy: what the kernels are given. A task is one band of one image.
#pragma once

#include "ops/cpu/isa.h"
#include "ops/upsampling_plan.h"
#include "ops/views.h"

namespace co2s {

// Outcome of one task; tasks are added in their order.
struct CrossEntropyPartial {
  double loss = 0;
  int64_t valid = 0, taken = 0;
  BadLabel bad;
};

template <class T> struct CrossEntropyArgs {
  LogitsView logits;
  PlanView<T> plan;
  MapView target, confidence, ignore_mask; // [B,H,W]
  BoxesView mix;
  int64_t ignore_index;
  double threshold;
  const T* class_weight;        // [K] or null
  const T* upstream;            // contiguous [B,H,W] that multiplies the gradient, or null
  T scale;                      // multiplies the gradient
  T* loss_map;                  // contiguous [B,H,W], zero at first, or null
  void* gradient;               // contiguous [B,K,h,w] or null; zero at first unless equal grids
  Dtype gradient_dtype;         // on equal grids; else T
  T* border;                    // [B,bands,K,w], for the gradient on unequal grids
  CrossEntropyPartial* partial; // [B * bands]
};

CO2S_DECLARE_KERNEL(masked_cross_entropy, const CrossEntropyArgs<float>&, int64_t begin,
                    int64_t end)
CO2S_DECLARE_KERNEL(masked_cross_entropy, const CrossEntropyArgs<double>&, int64_t begin,
                    int64_t end)

} // namespace co2s
