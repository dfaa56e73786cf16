// cutmix_ on CUDA tensors.
#include <limits>

#include "ops/cuda/arguments.h"

namespace co2s::cuda {
namespace {

// images [B,C,H,W] or [B,H,W], any dtype and strides
void cutmix_(at::Tensor& images, const at::Tensor& boxes, const at::Tensor& partner) {
  TORCH_CHECK_VALUE(images.dim() == 3 || images.dim() == 4,
                    "images: expected shape [B, C, H, W] or [B, H, W], found ", images.sizes());
  const OnDeviceOf device(images);
  const Boxes checked = checked_boxes(boxes, partner, images.size(0), images);
  if (images.numel() == 0) return;
  const at::Tensor planes = images.dim() == 3 ? images.unsqueeze(1) : images;
  TORCH_CHECK_VALUE(planes.size(1) <= std::numeric_limits<int32_t>::max() / planes.size(3),
                    "images: the CUDA kernels take fewer than 2^31 values a row, found ",
                    images.sizes());
  // Where the boxes lie is known on the device alone, so there is room for whole images.
  const at::Tensor patches = at::empty(planes.sizes(), planes.options(), at::MemoryFormat::Contiguous);
  CutMixProblem problem{};
  problem.images = static_cast<char*>(planes.mutable_data_ptr());
  problem.patches = static_cast<char*>(patches.mutable_data_ptr());
  problem.batch = planes.size(0);
  problem.channels = planes.size(1);
  problem.height = planes.size(2);
  problem.width = planes.size(3);
  problem.stride_b = planes.stride(0);
  problem.stride_c = planes.stride(1);
  problem.stride_y = planes.stride(2);
  problem.stride_x = planes.stride(3);
  problem.item = static_cast<int>(planes.element_size());
  problem.mix = checked.view();
  launch_cutmix(problem, device.stream());
}

} // namespace

CO2S_CUDA_IMPL(m) { m.impl("cutmix_", &cutmix_); }

} // namespace co2s::cuda
