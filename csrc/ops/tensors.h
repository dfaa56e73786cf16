// From torch tensors to the plain views of views.h, with the checks every op shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "ops/views.h"

namespace co2s {

using OptionalTensor = std::optional<at::Tensor>;
// What masked_cross_entropy returns: the loss, the counts, the saved gradient and the scale of a
// mean; the last two may be empty.
using LossTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// A pair of losses [2] (sums or means), their counts, both saved gradients, one over the divisors.
using PairTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// A saved gradient times one value, contiguous and in the logits' dtype; one launch on a GPU.
at::Tensor scaled(const at::Tensor& saved, const at::Tensor& upstream, const at::Tensor& logits);

// logits [B,K,h,w] of a floating dtype on a device of that type; raises a clear error otherwise.
LogitsView logits_view(const at::Tensor& logits, const char* name, at::DeviceType on = at::kCPU);

// A map [B,H,W] whose shape has been checked against (batch, height, width), where the logits are.
MapView integer_map(const at::Tensor& map, at::IntArrayRef shape, const at::Tensor& logits,
                    const char* name);
MapView float_map(const at::Tensor& map, at::IntArrayRef shape, const at::Tensor& logits,
                  const char* name);

// Keeps the contiguous copies alive that its view points into.
struct Boxes {
  at::Tensor boxes, partner;
  BoxesView view() const;
};
// Boxes and partners where `with` is, or none. Their values stay unseen: on a GPU that would need
// a host sync.
Boxes checked_boxes(const OptionalTensor& boxes, const OptionalTensor& partner, int64_t batch,
                    const at::Tensor& with);
void check_partners(const Boxes& boxes); // on the CPU

Dtype dtype_of(const at::Tensor& tensor, const char* name);

// The dtype of sums, confidences and saved gradients: float64 for float64 logits, else float32.
at::ScalarType wide_dtype(const at::Tensor& logits);

void check_threshold(double threshold);
void check_size(int64_t height, int64_t width);
// Which count divides a sum of losses: 0, 1, or -1 for none, as for a map.
void check_mean_over(int64_t mean_over, bool per_pixel);
void raise_bad_label(const BadLabel& bad, int64_t classes, int64_t ignore_index);

// An uninitialised tensor to be written completely, on huge pages where the system offers them:
// a fresh full-resolution gradient otherwise costs more in page faults than in arithmetic.
at::Tensor empty_for_writing(at::IntArrayRef shape, at::ScalarType dtype);

} // namespace co2s
