// Gradient of masked_cross_entropy, recomputed from the logits: no probability was stored.
//
// Equal grids: one read where a pixel is taken, one write. Through up(): tiles of cells, whose walk
// finds the loss on its way where both are wanted; of more classes than registers hold, a first
// kernel writes 16 bytes a pixel, after which blocks of kChunk classes are independent.
#include "ops/cuda/masked_cross_entropy.cuh"
#include "ops/cuda/transpose.cuh"

namespace co2s::cuda {
namespace {

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    masked_cross_entropy_backward_equal(const CrossEntropyProblem<Wide<S>> problem) {
  using T = Wide<S>;
  constexpr int V = kVectorLength<S, N, 1>;
  const VectorPosition at = vector_position(problem.grid, problem.blocks, V);
  if (!at.inside) return;
  const int64_t plane = static_cast<int64_t>(problem.grid.y.out) * problem.grid.x.out;
  const int64_t pixel = at.image * plane + at.pixel;
  PixelLabel labels[V];
  read_pixels(problem.maps, at, labels);
  if constexpr (N > 0) {
    bool any = false;
#pragma unroll
    for (int v = 0; v < V; ++v) any |= labels[v].label >= 0;
    Vectors<S, N, V> logits;
    if (any) {
      logits.load(problem.logits, at);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        T z[N] = {};
        if (labels[v].label >= 0) {
          logits.get(v, z);
          pixel_slope(z, labels[v].label, slope_weight(problem, labels[v].label, pixel + v));
        }
        logits.put(v, z);
      }
    } else {
      logits.clear();
    }
    logits.store(problem.gradient, problem.logits, at);
  } else {
    const auto classes = static_cast<int32_t>(problem.logits.classes);
    S* to = static_cast<S*>(problem.gradient) + at.image * classes * plane + at.pixel;
    const StridedLogits<S> z(problem.logits, at.image, at.y, at.x);
    const bool taken = labels[0].label >= 0;
    CrossEntropyStatistics<T> statistics{};
    if (taken) statistics = statistics_in_a_pass(problem, z, labels[0].label, pixel);
#pragma unroll 4
    for (int32_t k = 0; k < classes; ++k) {
      to[k * plane] = static_cast<S>(taken ? slope_of_class(z(k), k, statistics) : T(0));
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    masked_cross_entropy_statistics(const CrossEntropyProblem<Wide<S>> problem) {
  using T = Wide<S>;
  const ColumnPosition at = column_position(problem.grid, problem.blocks);
  if (at.y >= at.y_end) return;
  const int64_t image = problem.first_image + at.image;
  const Tap<T, int32_t> x = tap_at(problem.grid.x, at.x);
  const Mix mix = load_mix(problem.maps.mix, problem.maps.batch, image);
  const int64_t height = problem.grid.y.out, width = problem.grid.x.out;
  for (int32_t row = at.y; row < at.y_end; ++row) {
    const int32_t label = read_pixel(problem.maps, mix, image, row, at.x).label;
    CrossEntropyStatistics<T> statistics{T(0), T(0), T(0), kNotTaken};
    if (label >= 0) {
      const BlendedLogits<S> z(problem.logits, image, tap_at(problem.grid.y, row), x);
      statistics =
          statistics_in_a_pass(problem, z, label, (image * height + row) * width + at.x);
    }
    problem.statistics[(at.image * height + row) * width + at.x] = statistics;
  }
}

// A column of pixels: N classes from the tile's chunk on.
template <class S, int N, From Source> struct CrossEntropyBody {
  using T = Wide<S>;

  __device__ __forceinline__ CrossEntropyBody(const CrossEntropyProblem<T>& of, const Tile& of_tile)
      : problem(of), tile(of_tile), group_image(tile.image), image(of.first_image + tile.image),
        first_class(tile.chunk * N),
        classes(smaller(N, static_cast<int32_t>(of.logits.classes) - first_class)),
        mix(load_mix(of.maps.mix, of.maps.batch, image)) {}

  __device__ __forceinline__ void start(int32_t column, const Tap<T, int32_t>& tap) {
    x = column;
    own_column = tap.index0 >= tile.column;
    labels.start();
    logits.start(problem.logits, image, tap, first_class, classes);
  }

  __device__ __forceinline__ unsigned gradient(int32_t y, const Tap<T, int32_t>& tap, T (&g)[N]) {
    if constexpr (Source == From::kStatistics) {
      const CrossEntropyStatistics<T> statistics =
          problem.statistics[(group_image * problem.grid.y.out + y) * problem.grid.x.out + x];
      if (statistics.label < 0) return 0;
      logits.seek(tap.index0);
      logits.get(tap, g);
#pragma unroll
      for (int k = 0; k < N; ++k) g[k] = slope_of_class(g[k], first_class + k, statistics);
    } else {
      const int32_t label = labels.next(problem.maps, mix, image, y, x, problem.grid.y.out);
      const bool own = own_column && tap.index0 >= tile.row;
      if (Source == From::kLogitsWithLoss && own) {
        sums.count[0] += is_valid(label);
        sums.count[1] += is_taken(label);
      }
      if (!is_taken(label)) return 0;
      logits.seek(tap.index0);
      logits.get(tap, g);
      if constexpr (Source == From::kLogitsWithLoss) {
        pixel_loss_and_slope(problem, g, label, own, losses);
      } else {
        const int64_t index = (image * problem.grid.y.out + y) * problem.grid.x.out + x;
        pixel_slope(g, label, slope_weight(problem, label, index));
      }
    }
    return 1;
  }

  // The gradient that the forward saves is not rounded yet: it has still to be scaled.
  __device__ __forceinline__ void store(int, int32_t k, int32_t i, int32_t j, T value) const {
    using Stored = std::conditional_t<Source == From::kLogitsWithLoss, T, S>;
    const int64_t plane = image * problem.logits.classes + first_class + k;
    static_cast<Stored*>(
        problem.gradient)[(plane * problem.grid.y.in + i) * problem.grid.x.in + j] =
        static_cast<Stored>(value);
  }

  const CrossEntropyProblem<T>& problem;
  const Tile& tile;
  int64_t group_image, image;
  int32_t first_class, classes;
  Mix mix;
  Column<S, N> logits;
  LabelColumn labels;
  int32_t x;
  bool own_column; // of two tiles that visit a pixel, the one with its cell index0 counts it
  ThreadSums<1> sums;
  PixelLosses<T> losses;
};

template <class S, int N, From Source>
__global__ void __launch_bounds__(kTileThreads, blocks_at_once(N))
    masked_cross_entropy_tiles(const CrossEntropyProblem<Wide<S>> problem, const Tiles tiles) {
  const Tile tile = tile_of_block(tiles, problem.grid.y.in, problem.grid.x.in, blockIdx.x);
  CrossEntropyBody<S, N, Source> body(problem, tile);
  transpose_tile<Wide<S>, 1, N>(problem.grid, tiles, tile, body.classes, body);
  if constexpr (Source == From::kLogitsWithLoss) {
    body.sums.value[0] = body.losses.finished();
    store_partial(problem.partial, body.sums);
  }
}

template <class S, int N, From Source>
void launch_tiles(const CrossEntropyProblem<Wide<S>>& problem, Stream stream) {
  using T = Wide<S>;
  const Tiles tiles = make_tiles(problem.grid, problem.images, problem.logits.classes, N, 1);
  launch(masked_cross_entropy_tiles<S, N, Source>, count_tiles(tiles, problem.images),
         dim3(tiles.threads), tile_bytes(tiles, N, 1, sizeof(T)), stream, problem, tiles);
}

} // namespace

template <class T>
void launch_cross_entropy_backward(const CrossEntropyProblem<T>& problem, Stream stream) {
  with_kernel<T>(problem.logits.dtype, problem.registers, [&](auto storage, auto registers) {
    using S = decltype(storage);
    constexpr int N = decltype(registers)::value;
    if (problem.grid.equal) {
      launch(masked_cross_entropy_backward_equal<S, N>, problem.blocks.all, dim3(kThreads), 0,
             stream, problem);
    } else if constexpr (N > 0 && N <= kMostTransposed) {
      launch_tiles<S, N, From::kLogits>(problem, stream);
    } else {
      launch(masked_cross_entropy_statistics<S>, problem.blocks.all,
             dim3(kColumns, kThreads / kColumns), 0, stream, problem);
      launch_tiles<S, kChunk, From::kStatistics>(problem, stream);
    }
  });
}

template <class T>
void launch_cross_entropy_with_gradient(const CrossEntropyProblem<T>& problem, Stream stream) {
  with_kernel<T>(problem.logits.dtype, problem.registers, [&](auto storage, auto registers) {
    constexpr int N = decltype(registers)::value;
    if constexpr (N > 0 && N <= kMostTransposed) {
      launch_tiles<decltype(storage), N, From::kLogitsWithLoss>(problem, stream);
    }
  });
}

template void launch_cross_entropy_with_gradient(const CrossEntropyProblem<float>&, Stream);
template void launch_cross_entropy_with_gradient(const CrossEntropyProblem<double>&, Stream);
template void launch_cross_entropy_backward(const CrossEntropyProblem<float>&, Stream);
template void launch_cross_entropy_backward(const CrossEntropyProblem<double>&, Stream);

} // namespace co2s::cuda
