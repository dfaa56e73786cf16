// cutmix_: pastes each image's box from its partner's original, in place.
//
// Plain memory copies, so there is no kernel to compile per instruction set.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "ops/tensors.h"

namespace co2s {
namespace {

struct Box {
  int64_t x1, y1, x2, y2;
  bool empty() const { return x2 <= x1 || y2 <= y1; }
  int64_t pixels() const { return empty() ? 0 : (x2 - x1) * (y2 - y1); }
};

Box clamped_box(const int32_t* box, int64_t height, int64_t width) {
  const auto clamp = [](int64_t x, int64_t high) { return x < 0 ? 0 : (x > high ? high : x); };
  return {clamp(box[0], width), clamp(box[1], height), clamp(box[2], width),
          clamp(box[3], height)};
}

// images as [B, C, H, W], contiguous.
void paste(at::Tensor& images, const Boxes& boxes) {
  const int64_t batch = images.size(0), channels = images.size(1);
  const int64_t height = images.size(2), width = images.size(3), item = images.element_size();
  const BoxesView view = boxes.view();
  char* data = static_cast<char*>(images.mutable_data_ptr());
  const auto row = [&](int64_t b, int64_t c, int64_t y, int64_t x) {
    return data + (((b * channels + c) * height + y) * width + x) * item;
  };
  std::vector<Box> box(batch);
  std::vector<std::vector<char>> patch(batch);
  for (int64_t b = 0; b < batch; ++b) box[b] = clamped_box(view.boxes + 4 * b, height, width);
  // Every patch is read before any is written: a partner gives its original pixels.
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      if (view.partner[b] == b) box[b].x2 = box[b].x1; // its own pixels: nothing to do
      patch[b].resize(box[b].pixels() * channels * item);
      char* to = patch[b].data();
      const int64_t bytes = (box[b].x2 - box[b].x1) * item;
      for (int64_t c = 0; c < channels && !box[b].empty(); ++c) {
        for (int64_t y = box[b].y1; y < box[b].y2; ++y, to += bytes) {
          std::memcpy(to, row(view.partner[b], c, y, box[b].x1), bytes);
        }
      }
    }
  });
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const char* from = patch[b].data();
      const int64_t bytes = (box[b].x2 - box[b].x1) * item;
      for (int64_t c = 0; c < channels && !box[b].empty(); ++c) {
        for (int64_t y = box[b].y1; y < box[b].y2; ++y, from += bytes) {
          std::memcpy(row(b, c, y, box[b].x1), from, bytes);
        }
      }
    }
  });
}

// images [B,C,H,W] or [B,H,W], any dtype and strides
void cutmix_(at::Tensor& images, const at::Tensor& boxes, const at::Tensor& partner) {
  TORCH_CHECK_VALUE(images.dim() == 3 || images.dim() == 4,
                    "images: expected shape [B, C, H, W] or [B, H, W], found ", images.sizes());
  TORCH_CHECK_VALUE(images.device().is_cpu(), "images: expected a CPU tensor, found ",
                    images.device());
  const Boxes checked = checked_boxes(boxes, partner, images.size(0), images);
  check_partners(checked);
  if (images.numel() == 0) return;
  at::Tensor planes = images.dim() == 3 ? images.unsqueeze(1) : images;
  if (planes.is_contiguous()) {
    paste(planes, checked);
  } else if (planes.permute({0, 2, 3, 1}).is_contiguous()) {
    // Channels-last: a pixel's channels are one wide element of a one-channel image.
    at::Tensor rows = planes.permute({0, 2, 3, 1}).flatten(2).unsqueeze(1); // [B, 1, H, W * C]
    at::Tensor wide = checked.boxes.clone();
    wide.select(1, 0).clamp_(0, planes.size(3)).mul_(planes.size(1));
    wide.select(1, 2).clamp_(0, planes.size(3)).mul_(planes.size(1));
    paste(rows, {wide, checked.partner});
  } else {
    at::Tensor copy = planes.contiguous();
    paste(copy, checked);
    planes.copy_(copy);
  }
}

} // namespace

TORCH_LIBRARY_IMPL(co2s_native, CPU, m) { m.impl("cutmix_", &cutmix_); }

} // namespace co2s
