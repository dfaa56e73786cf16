// What each kernel is given, in plain types: the host part and the kernels share nothing else.
#pragma once

#include "ops/cuda/geometry.h"
#include "ops/views.h"

struct CUstream_st;

namespace co2s::cuda {

// One block's share of a sum; added in the order of the blocks.
struct Partial {
  double value[2];
  int64_t count[2];
};

// Where the sums of the partials go: `values` of the sums (0, 1 or 2) and both counts. With `scale`
// [values], sum i becomes a mean over `times` · the count `mean_over[i]`, taken as at least 1, and
// `scale[i]` is one over that.
template <class T> struct Totals {
  int values;
  T* sums;
  int64_t* counts;
  T* scale = nullptr;
  int mean_over[2] = {0, 1};
  int64_t times = 1;
};

// How many classes the kernels for K classes keep in registers; 0: none, they are read in passes.
constexpr int registers_for(int64_t classes) {
  for (int registers : {6, 8, 16, 32}) {
    if (classes <= registers) return registers;
  }
  return 0;
}

// What a thread holds of one class on equal grids: 16 bytes, less where the classes of all
// students would fill the registers.
constexpr int vector_bytes(int registers, int students, int item) {
  const int held = registers * students * (item == 2 ? 2 : 1);
  return held <= 16 ? 16 : (held <= 32 ? 8 : 4);
}

// Through up(), the backward keeps several values a class: beyond so many classes (of one student,
// of two) it reads them in passes, kChunk classes a block.
constexpr int kMostTransposed = 16, kMostTransposedPair = 8, kChunk = 8;

// Whether one walk through up() finds the loss and its gradient, of so many registers a student.
constexpr bool has_fused_gradient(int registers, int most) {
  return registers > 0 && registers <= most;
}

// Where a pixel's label, confidence and padding are read. See co2s::MapView for their strides.
struct PixelMaps {
  MapView target, confidence, ignore_mask; // [B,H,W]
  BoxesView mix;
  int64_t ignore_index, batch, classes;
  int32_t width;
  double threshold;
  float float_threshold; // the same, rounded: not for every pixel again
  int32_t aligned; // so many consecutive pixels of each map may be read at once
  bool flat;       // every map is contiguous, and 32 bits hold its offsets; no float64
};

template <class T> struct ConfidenceProblem {
  LogitsView logits;
  Grid<T> grid;
  int registers;
  PixelBlocks blocks;
  T* confidence;       // contiguous [B,H,W]
  int64_t* label;      // contiguous [B,H,W]; null: see byte_label
  uint8_t* byte_label; // contiguous [B,H,W]
};

template <class T> struct CrossEntropyStatistics;

template <class T> struct CrossEntropyProblem {
  LogitsView logits;
  Grid<T> grid;
  int registers;
  PixelBlocks blocks;
  PixelMaps maps;
  const T* class_weight; // [K] or null
  T* loss_map;           // contiguous [B,H,W] or null
  Partial* partial;      // [blocks.all], forward
  const T* upstream;     // one value, or contiguous [B,H,W] when per_pixel
  bool per_pixel;
  void* gradient; // contiguous [B,K,h,w], of the logits' dtype
  // The backward through up() of many classes: `images` images from `first_image` on.
  int64_t first_image, images;
  CrossEntropyStatistics<T>* statistics; // [images,H,W]
};

template <class T> struct StabilityStatistics;

template <class T> struct StabilityProblem {
  LogitsView logits[2];
  Grid<T> grid;
  int registers;
  PixelBlocks blocks;
  PixelMaps maps; // the ignore mask alone
  T threshold;
  Partial* partial;  // [blocks.all], forward
  const T* upstream; // [2]
  void* gradient[2]; // contiguous [B,K,h,w], of the logits' dtype, or null
  int64_t first_image, images;
  StabilityStatistics<T>* statistics; // [images,H,W]
};

constexpr int kMostBins = 4096; // of a histogram in shared memory; beyond, in the matrix itself

template <class T> struct ConfusionProblem {
  LogitsView logits;
  Grid<T> grid;
  bool vectors; // on equal grids, 16 bytes of a class at once
  PixelBlocks blocks;
  PixelMaps maps;
  int64_t* out; // [K,K]
  int64_t out_row, out_column; // strides
};

struct CutMixProblem {
  char* images;  // [B,C,H,W]
  char* patches; // scratch of their size
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_c, stride_y, stride_x; // in elements
  int item;                                       // bytes of an element
  BoxesView mix;
};

using Stream = CUstream_st*;

// What a pixel needs in the passes after the first, in bytes.
constexpr int64_t kCrossEntropyStatisticsItems = 4, kStabilityStatisticsItems = 8;

template <class T> void launch_softmax_confidence(const ConfidenceProblem<T>&, Stream);
template <class T> void launch_cross_entropy(const CrossEntropyProblem<T>&, Stream);
template <class T> void launch_cross_entropy_backward(const CrossEntropyProblem<T>&, Stream);
// The loss and, in `gradient`, its gradient of dtype T. Where has_fused_gradient says so, not on
// equal grids; a partial sum for each of the tiles of make_tiles.
template <class T> void launch_cross_entropy_with_gradient(const CrossEntropyProblem<T>&, Stream);
template <class T> void launch_stability_with_gradients(const StabilityProblem<T>&, Stream);
template <class T> void launch_stability(const StabilityProblem<T>&, Stream);
template <class T> void launch_stability_backward(const StabilityProblem<T>&, Stream);
template <class T> void launch_confusion_matrix(const ConfusionProblem<T>&, Stream);
void launch_cutmix(const CutMixProblem&, Stream);
template <class T>
void launch_sum_partials(const Partial* partial, int64_t blocks, const Totals<T>&, Stream);

} // namespace co2s::cuda
