// From CUDA tensors to the problems of problems.h, with the checks every op shares. Reading out of
// bounds is impossible with what passes them; everything else is checked by the Python functions.
#pragma once

#include <ATen/Functions.h>
#include <torch/library.h>

#include "ops/cuda/problems.h"
#include "ops/tensors.h"

#if defined(CO2S_EMULATE_CUDA)
#define CO2S_CUDA_IMPL(m) TORCH_LIBRARY_IMPL(co2s_emulated, CPU, m)
#define CO2S_CUDA_DEVICE at::kCPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define CO2S_CUDA_IMPL(m) TORCH_LIBRARY_IMPL(co2s_native, CUDA, m)
#define CO2S_CUDA_DEVICE at::kCUDA
#endif

namespace co2s::cuda {

// The tensor's device is the current one as long as this lives; launches go to its current stream.
class OnDeviceOf {
public:
#if defined(CO2S_EMULATE_CUDA)
  explicit OnDeviceOf(const at::Tensor&) {}
  Stream stream() const { return nullptr; }
#else
  explicit OnDeviceOf(const at::Tensor& tensor) : guard_(tensor.device()) {}
  Stream stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

private:
  c10::cuda::CUDAGuard guard_;
#endif
};

// Checks that 32 bits hold every coordinate and every pixel of an image.
void check_extent(const LogitsView& logits, int64_t height, int64_t width);

// How many consecutive pixels of every given map may be read at once: a power of two.
int32_t aligned_pixels(const PixelMaps& maps, int64_t height);

// Whether every given map is contiguous, has fewer than 2^31 pixels and no float64 ones.
bool are_flat(const PixelMaps& maps, int64_t batch, int64_t height);

// Whether the logits of `length` consecutive pixels can be read at once.
bool has_vectors(const LogitsView& logits, int64_t length);

// Chooses between registers and passes (problems.h) and cuts the pixels into blocks. The vectors
// of equal grids need aligned logits; others go pixel by pixel.
struct Choice {
  int registers;
  PixelBlocks blocks;
};
Choice choose(const LogitsView* logits, int students, bool equal, int64_t batch, int64_t height,
              int64_t width);

at::Tensor new_partials(int64_t blocks, const at::Tensor& on);

// How many tiles make_tiles cuts the batch into, for all classes of `gradients` students.
template <class T>
int64_t count_tiles(const Grid<T>& grid, const LogitsView& logits, int registers, int gradients) {
  return count_tiles(make_tiles(grid, logits.batch, logits.classes, registers, gradients),
                     logits.batch);
}

inline Partial* partials(const at::Tensor& tensor) {
  return static_cast<Partial*>(tensor.data_ptr());
}

// Images whose scratch fits into 64 MiB, at least one.
int64_t images_at_once(int64_t batch, int64_t height, int64_t width, int64_t bytes_a_pixel);

} // namespace co2s::cuda
