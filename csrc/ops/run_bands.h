// Runs a kernel over all bands of all images in parallel, and joins the gradients of the bands.
#pragma once

#include <algorithm>
#include <atomic>

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include "ops/borders.h"
#include "ops/tensors.h"
#include "ops/upsampling_plan.h"

namespace co2s {

constexpr int64_t kSharesOfAThread = 8;

// Tasks 0 .. batch * bands - 1; which thread runs which has no influence on any result. Threads take
// a few at a time, since bands without a confident pixel cost next to nothing.
template <class T, class F> void run_bands(int64_t batch, const PlanView<T>& plan, F kernel) {
  const int64_t tasks = batch * plan.bands, threads = at::get_num_threads();
  const int64_t share = std::max<int64_t>(1, tasks / (threads * kSharesOfAThread));
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(share); begin < tasks; begin = next.fetch_add(share)) {
      kernel(begin, std::min(begin + share, tasks));
    }
  });
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
