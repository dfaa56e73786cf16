// Runs a kernel over all bands of all images in parallel, and joins the gradients of the bands.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include "ops/borders.h"
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

template <class T> void add_borders(const GradientTensors& tensors, const PlanView<T>& plan) {
  if (plan.identity || plan.bands < 2) return;
  add_borders(tensors.gradient.template mutable_data_ptr<T>(),
              tensors.border.template const_data_ptr<T>(), tensors.gradient.size(0),
              tensors.gradient.size(1), plan);
}

} // namespace co2s
