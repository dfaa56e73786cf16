// Runs a kernel over all bands of all images in parallel, and joins the gradients of the bands.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include "ops/tensors.h"
#include "ops/upsampling_plan.h"

namespace co2s {

// Tasks 0 .. batch * bands - 1; which thread runs which has no influence on any result.
template <class T, class F> void run_bands(int64_t batch, const PlanView<T>& plan, F kernel) {
  at::parallel_for(0, batch * plan.bands, 1, kernel);
}

// A gradient being built: see GradientView in cpu/grid.h.
struct GradientTensors {
  at::Tensor gradient, border;
};

// Memory for the gradient of `logits`: on equal grids of `dtype`, else wide (cast by the caller).
template <class T>
GradientTensors new_gradient(const at::Tensor& logits, const PlanView<T>& plan,
                             at::ScalarType dtype) {
  if (plan.identity) return {empty_for_writing(logits.sizes(), dtype), {}};
  const auto wide = at::TensorOptions().dtype(wide_dtype(logits));
  return {at::zeros(logits.sizes(), wide),
          at::empty({logits.size(0), plan.bands, logits.size(1), plan.in_width}, wide)};
}

// Adds what each band left for the first source row of the next one; always in the same order.
template <class T> void add_borders(const GradientTensors& tensors, const PlanView<T>& plan) {
  if (plan.identity || plan.bands < 2) return;
  T* gradient = tensors.gradient.template mutable_data_ptr<T>();
  const T* border = tensors.border.template const_data_ptr<T>();
  const int64_t batch = tensors.gradient.size(0), classes = tensors.gradient.size(1);
  const int64_t h = plan.in_height, w = plan.in_width;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t band = 0; band + 1 < plan.bands; ++band) {
      const int64_t row = plan.y_index0[plan.band_begin[band + 1]];
      const int64_t last = plan.y_index0[plan.band_begin[band + 1] - 1];
      if (last + 1 != row) continue; // downsampling: the bands share no row
      for (int64_t k = 0; k < classes; ++k) {
        T* to = gradient + ((b * classes + k) * h + row) * w;
        const T* from = border + ((b * plan.bands + band) * classes + k) * w;
        for (int64_t x = 0; x < w; ++x) to[x] += from[x];
      }
    }
  }
}

} // namespace co2s
