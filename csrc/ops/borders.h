// Joins the gradients of neighbouring bands; without torch, so that the C++ tests reach it.
#pragma once

#include "ops/upsampling_plan.h"

namespace co2s {

// Adds to gradient [B,K,h,w] what each band left in border [B,bands,K,w] for the first source row
// of the next one; always in the same order.
template <class T>
void add_borders(T* gradient, const T* border, int64_t batch, int64_t classes,
                 const PlanView<T>& plan) {
  const int64_t h = plan.in_height, w = plan.in_width;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t band = 0; band + 1 < plan.bands; ++band) {
      const int64_t row = plan.y_index0[plan.band_begin[band + 1]];
      const int64_t last = plan.y_index0[plan.band_begin[band + 1] - 1];
      if (last + plan.next_row != row) continue; // the bands share no row
      for (int64_t k = 0; k < classes; ++k) {
        T* to = gradient + ((b * classes + k) * h + row) * w;
        const T* from = border + ((b * plan.bands + band) * classes + k) * w;
        for (int64_t x = 0; x < w; ++x) to[x] += from[x];
      }
    }
  }
}

} // namespace co2s
