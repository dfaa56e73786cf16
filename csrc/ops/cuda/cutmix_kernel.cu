// cutmix_: copies the boxes out of the partners, then into the images; two kernels, because a
// partner has to give its original pixels. Elements are moved as bits.
#include "ops/cuda/pixels.cuh"

namespace co2s::cuda {
namespace {

// A block is a row of one image. E: an unsigned type of the element's size.
template <class E, bool Paste>
__global__ void __launch_bounds__(kThreads) cutmix_copy(const CutMixProblem problem) {
  const uint32_t height = static_cast<uint32_t>(problem.height);
  const int64_t image = blockIdx.x / height, y = blockIdx.x % height;
  const Mix mix = load_mix(problem.mix, problem.batch, image);
  if (mix.partner == image || y < mix.box[1] || y >= mix.box[3]) return;
  const int64_t begin = mix.box[0] > 0 ? mix.box[0] : 0;
  const int64_t end = mix.box[2] < problem.width ? mix.box[2] : problem.width;
  if (end <= begin) return;
  const uint32_t columns = static_cast<uint32_t>(end - begin);
  const uint32_t channels = static_cast<uint32_t>(problem.channels);
  E* row = reinterpret_cast<E*>(problem.images) + (Paste ? image : mix.partner) * problem.stride_b +
           y * problem.stride_y;
  E* patch = reinterpret_cast<E*>(problem.patches) +
             (image * problem.height + y) * problem.channels * problem.width;
  // Neighbouring threads take neighbouring elements: columns, or channels where those are closer.
  const bool channels_first = problem.stride_x <= problem.stride_c || problem.channels == 1;
  const uint32_t inner = channels_first ? columns : channels;
  for (uint32_t i = threadIdx.x; i < channels * columns; i += kThreads) {
    const uint32_t slow = i / inner, fast = i - slow * inner;
    const int64_t c = channels_first ? slow : fast, x = begin + (channels_first ? fast : slow);
    E& element = row[c * problem.stride_c + x * problem.stride_x];
    if (Paste) {
      element = patch[i];
    } else {
      patch[i] = element;
    }
  }
}

struct alignas(16) TwoWords {
  uint64_t words[2];
};

template <class E> void launch_both(const CutMixProblem& problem, Stream stream) {
  const int64_t blocks = problem.batch * problem.height;
  launch(cutmix_copy<E, false>, blocks, dim3(kThreads), 0, stream, problem);
  launch(cutmix_copy<E, true>, blocks, dim3(kThreads), 0, stream, problem);
}

} // namespace

void launch_cutmix(const CutMixProblem& problem, Stream stream) {
  switch (problem.item) {
  case 1: launch_both<uint8_t>(problem, stream); break;
  case 2: launch_both<uint16_t>(problem, stream); break;
  case 4: launch_both<uint32_t>(problem, stream); break;
  case 8: launch_both<uint64_t>(problem, stream); break;
  default: launch_both<TwoWords>(problem, stream); // 16: complex128
  }
}

} // namespace co2s::cuda
