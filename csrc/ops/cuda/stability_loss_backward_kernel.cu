// Gradients of stability_loss, recomputed from the logits: both students' from one walk.
//
// Equal grids: one read, one write. Through up(): tiles of cells, as for the cross-entropy, and the
// loss with them.
#include "ops/cuda/stability_loss.cuh"
#include "ops/cuda/transpose.cuh"

namespace co2s::cuda {
namespace {

template <class S, int N>
__global__ void __launch_bounds__(kThreads)
    stability_loss_backward_equal(const StabilityProblem<Wide<S>> problem) {
  using T = Wide<S>;
  constexpr int V = kVectorLength<S, N, 2>;
  const VectorPosition at = vector_position(problem.grid, problem.blocks, V);
  if (!at.inside) return;
  const T scale[2] = {problem.upstream[0], problem.upstream[1]};
  bool unmasked[V];
  read_unmasked(problem.maps, at, unmasked);
  if constexpr (N > 0) {
    bool any = false;
#pragma unroll
    for (int v = 0; v < V; ++v) any |= unmasked[v];
    Vectors<S, N, V> a, b;
    if (any) {
      a.load(problem.logits[0], at);
      b.load(problem.logits[1], at);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        T p[N], q[N];
        a.get(v, p);
        b.get(v, q);
        Comparison<T> found;
        if (unmasked[v]) found = compare(p, q, problem.threshold);
        T slope_a[N] = {}, slope_b[N] = {};
        if (found.a_learns) learner_slopes(p, q, scale[0], slope_a);
        if (found.b_learns) learner_slopes(q, p, scale[1], slope_b);
        a.put(v, slope_a);
        b.put(v, slope_b);
      }
    } else {
      a.clear();
      b.clear();
    }
    if (problem.gradient[0] != nullptr) a.store(problem.gradient[0], problem.logits[0], at);
    if (problem.gradient[1] != nullptr) b.store(problem.gradient[1], problem.logits[1], at);
  } else {
    const auto classes = static_cast<int32_t>(problem.logits[0].classes);
    const int64_t plane = static_cast<int64_t>(problem.grid.y.out) * problem.grid.x.out;
    const int64_t out = at.image * classes * plane + at.pixel;
    const StridedLogits<S> a(problem.logits[0], at.image, at.y, at.x);
    const StridedLogits<S> b(problem.logits[1], at.image, at.y, at.x);
    StabilityStatistics<T> statistics{};
    if (unmasked[0]) compare_in_passes(a, b, classes, problem.threshold, &statistics);
    const bool some = statistics.a_learns || statistics.b_learns;
#pragma unroll 4
    for (int32_t k = 0; k < classes; ++k) {
      T slope_a = 0, slope_b = 0;
      if (some) {
        slope_a = a(k);
        slope_b = b(k);
        class_slopes(slope_a, slope_b, statistics, scale);
      }
      const int64_t cell = out + k * plane;
      if (problem.gradient[0] != nullptr) {
        static_cast<S*>(problem.gradient[0])[cell] = static_cast<S>(slope_a);
      }
      if (problem.gradient[1] != nullptr) {
        static_cast<S*>(problem.gradient[1])[cell] = static_cast<S>(slope_b);
      }
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    stability_loss_statistics(const StabilityProblem<Wide<S>> problem) {
  using T = Wide<S>;
  const ColumnPosition at = column_position(problem.grid, problem.blocks);
  if (at.y >= at.y_end) return;
  const int64_t image = problem.first_image + at.image;
  const auto classes = static_cast<int32_t>(problem.logits[0].classes);
  const Tap<T, int32_t> x = tap_at(problem.grid.x, at.x);
  const int64_t height = problem.grid.y.out, width = problem.grid.x.out;
  for (int32_t row = at.y; row < at.y_end; ++row) {
    StabilityStatistics<T> statistics{};
    if (is_unmasked(problem.maps, image, row, at.x)) {
      const Tap<T, int32_t> y = tap_at(problem.grid.y, row);
      compare_in_passes(BlendedLogits<S>(problem.logits[0], image, y, x),
                        BlendedLogits<S>(problem.logits[1], image, y, x), classes,
                        problem.threshold, &statistics);
    }
    problem.statistics[(at.image * height + row) * width + at.x] = statistics;
  }
}

// A column of pixels: N classes of both students from the tile's chunk on.
template <class S, int N, From Source> struct StabilityBody {
  using T = Wide<S>;

  __device__ __forceinline__ StabilityBody(const StabilityProblem<T>& of, const Tile& of_tile)
      : problem(of), tile(of_tile), group_image(tile.image), image(of.first_image + tile.image),
        first_class(tile.chunk * N),
        classes(smaller(N, static_cast<int32_t>(of.logits[0].classes) - first_class)) {
    if constexpr (Source == From::kLogitsWithLoss) {
      scale[0] = scale[1] = T(1);
    } else {
      scale[0] = of.upstream[0];
      scale[1] = of.upstream[1];
    }
  }

  __device__ __forceinline__ void start(int32_t column, const Tap<T, int32_t>& tap) {
    x = column;
    own_column = tap.index0 >= tile.column;
    mask.start();
    a.start(problem.logits[0], image, tap, first_class, classes);
    b.start(problem.logits[1], image, tap, first_class, classes);
  }

  __device__ __forceinline__ unsigned gradient(int32_t y, const Tap<T, int32_t>& tap,
                                               T (&g)[2 * N]) {
    T p[N], q[N];
    if constexpr (Source == From::kStatistics) {
      const StabilityStatistics<T> statistics =
          problem.statistics[(group_image * problem.grid.y.out + y) * problem.grid.x.out + x];
      if (!statistics.a_learns && !statistics.b_learns) return 0;
      read(tap, p, q);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        class_slopes(p[k], q[k], statistics, scale);
        g[k] = p[k];
        g[N + k] = q[k];
      }
      return 3;
    } else {
      if (!mask.next(problem.maps, image, y, x, problem.grid.y.out)) return 0;
      read(tap, p, q);
      const Comparison<T> found = compare(p, q, problem.threshold);
      if (Source == From::kLogitsWithLoss && own_column && tap.index0 >= tile.row) {
        add(own, found);
      }
      if (found.a_learns) learner_slopes(p, q, scale[0], g);
      if (found.b_learns) learner_slopes(q, p, scale[1], g + N);
      return (found.a_learns ? 1u : 0u) | (found.b_learns ? 2u : 0u);
    }
  }

  __device__ __forceinline__ void read(const Tap<T, int32_t>& tap, T (&p)[N], T (&q)[N]) {
    a.seek(tap.index0);
    b.seek(tap.index0);
    a.get(tap, p);
    b.get(tap, q);
  }

  // The gradients that the forward saves are not rounded yet: they have still to be scaled.
  __device__ __forceinline__ void store(int of, int32_t k, int32_t i, int32_t j, T value) const {
    using Stored = std::conditional_t<Source == From::kLogitsWithLoss, T, S>;
    if (problem.gradient[of] == nullptr) return;
    const int64_t plane = image * problem.logits[0].classes + first_class + k;
    static_cast<Stored*>(
        problem.gradient[of])[(plane * problem.grid.y.in + i) * problem.grid.x.in + j] =
        static_cast<Stored>(value);
  }

  const StabilityProblem<T>& problem;
  const Tile& tile;
  int64_t group_image, image;
  int32_t first_class, classes, x;
  T scale[2];
  Column<S, N> a, b;
  MaskColumn mask;
  bool own_column; // of two tiles that visit a pixel, the one with its cell index0 counts it
  struct {
    T value[2] = {}; // of a few dozen pixels: T is exact enough
    int32_t count[2] = {};
  } own;
};

template <class S, int N, From Source>
__global__ void __launch_bounds__(kTileThreads)
    stability_loss_tiles(const StabilityProblem<Wide<S>> problem, const Tiles tiles) {
  const Tile tile = tile_of_block(tiles, problem.grid.y.in, problem.grid.x.in, blockIdx.x);
  StabilityBody<S, N, Source> body(problem, tile);
  transpose_tile<Wide<S>, 2, N>(problem.grid, tiles, tile, body.classes, body);
  if constexpr (Source == From::kLogitsWithLoss) {
    store_partial(problem.partial, ThreadSums<2>{{body.own.value[0], body.own.value[1]},
                                                 {body.own.count[0], body.own.count[1]}});
  }
}

template <class S, int N, From Source>
void launch_tiles(const StabilityProblem<Wide<S>>& problem, Stream stream) {
  using T = Wide<S>;
  const Tiles tiles = make_tiles(problem.grid, problem.images, problem.logits[0].classes, N, 2);
  launch(stability_loss_tiles<S, N, Source>, count_tiles(tiles, problem.images),
         dim3(tiles.threads), tile_bytes(tiles, N, 2, sizeof(T)), stream, problem, tiles);
}

} // namespace

template <class T>
void launch_stability_backward(const StabilityProblem<T>& problem, Stream stream) {
  with_kernel<T>(problem.logits[0].dtype, problem.registers, [&](auto storage, auto registers) {
    using S = decltype(storage);
    constexpr int N = decltype(registers)::value;
    if (problem.grid.equal) {
      launch(stability_loss_backward_equal<S, N>, problem.blocks.all, dim3(kThreads), 0, stream,
             problem);
    } else if constexpr (N > 0 && N <= kMostTransposedPair) {
      launch_tiles<S, N, From::kLogits>(problem, stream);
    } else {
      launch(stability_loss_statistics<S>, problem.blocks.all,
             dim3(kColumns, kThreads / kColumns), 0, stream, problem);
      launch_tiles<S, kChunk, From::kStatistics>(problem, stream);
    }
  });
}

template <class T>
void launch_stability_with_gradients(const StabilityProblem<T>& problem, Stream stream) {
  with_kernel<T>(problem.logits[0].dtype, problem.registers, [&](auto storage, auto registers) {
    constexpr int N = decltype(registers)::value;
    if constexpr (N > 0 && N <= kMostTransposedPair) {
      launch_tiles<decltype(storage), N, From::kLogitsWithLoss>(problem, stream);
    }
  });
}

template void launch_stability_with_gradients(const StabilityProblem<float>&, Stream);
template void launch_stability_with_gradients(const StabilityProblem<double>&, Stream);
template void launch_stability_backward(const StabilityProblem<float>&, Stream);
template void launch_stability_backward(const StabilityProblem<double>&, Stream);

} // namespace co2s::cuda
