// The transpose of up(): gradients of pixels, summed into the gradients of the cells they read.
//
// A block owns a tile of cells and walks all pixels that read them, a thread a column of pixels
// (tiles overlap by the pixels they share, which both compute). Sums along y stay in registers;
// after each row of cells the columns' sums meet in shared memory, where each cell adds those of
// its own columns. No atomics, and an order that depends on the shapes alone.
#pragma once

#include "ops/cuda/logits.cuh"

namespace co2s::cuda {

// What a Body makes the gradients of pixels from: statistics of an earlier kernel, or the logits; or
// from them the loss as well.
enum class From { kStatistics, kLogits, kLogitsWithLoss };

template <class T, int Sums> struct TileMemory {
  static constexpr int kBuffers = column_buffers(Sums, sizeof(T));

  Pack<T, 2>* columns;  // [kBuffers, Sums / 2, threads]: column sums of one row of cells
  T* cells;             // [Sums, rows, columns]: sums so far, where a tile takes several passes
  T *weight0, *weight1; // [threads]: of a column's pixels in the cells index0 and index0 + 1
  int32_t* column;      // [columns + 2]: first pixel column of the interval before each cell
  int32_t* row;         // [rows + 2]: likewise
};

template <class T, int Sums>
__device__ __forceinline__ TileMemory<T, Sums> tile_memory(const Tiles& tiles) {
  TileMemory<T, Sums> memory;
  memory.columns = reinterpret_cast<Pack<T, 2>*>(dynamic_shared());
  memory.cells = reinterpret_cast<T*>(memory.columns + memory.kBuffers * Sums / 2 * tiles.threads);
  memory.weight0 = memory.cells + (tiles.one_pass ? 0 : Sums * tiles.rows * tiles.columns);
  memory.weight1 = memory.weight0 + tiles.threads;
  memory.column = reinterpret_cast<int32_t*>(memory.weight1 + tiles.threads);
  memory.row = memory.column + tiles.columns + 2;
  return memory;
}

// The weights of a pixel in cell index0 and in the next one. At the last cell both are its own.
template <class T> CO2S_HD Tap<T, int32_t> folded(Tap<T, int32_t> tap) {
  if (tap.index1 == tap.index0) {
    tap.lower += tap.upper;
    tap.upper = T(0);
  }
  return tap;
}

// Two values, Σ over the pixel columns of this pass that read cell `j` of the tile, in the order of
// the columns: those between it and the cell before, then those between it and the next one.
template <class T, int Sums>
__device__ __forceinline__ Pack<T, 2> sums_of_cell(const TileMemory<T, Sums>& memory,
                                                   const Pack<T, 2>* columns, int32_t j,
                                                   int32_t begin, int32_t end) {
  const auto inside = [&](int32_t x) { return smaller(x < begin ? begin : x, end) - begin; };
  const int32_t own = inside(memory.column[j + 1]), last = inside(memory.column[j + 2]);
  Pack<T, 2> sum{{T(0), T(0)}};
  const auto add = [&](int32_t x, const T* weights) {
    const Pack<T, 2> value = columns[x];
    const T weight = weights[x];
    sum.value[0] = fma(weight, value.value[0], sum.value[0]);
    sum.value[1] = fma(weight, value.value[1], sum.value[1]);
  };
  int32_t x = inside(memory.column[j]);
#pragma unroll 4
  for (; x < own; ++x) add(x, memory.weight1);
#pragma unroll 4
  for (; x < last; ++x) add(x, memory.weight0);
  return sum;
}

// Body makes the gradients of pixels:
//   start(x, tap)             the thread's column of pixels; not called for idle threads
//   gradient(y, tap, g)       d/d logits [Gradients][N] of one pixel; returns a bit for each of the
//                             Gradients, which is 0 where all of its values are, unset then
//   store(gradient, k, i, j, value)  one finished value of cell (i, j)
template <class T, int Gradients, int N, class Body>
__device__ __forceinline__ void transpose_tile(const Grid<T>& grid, const Tiles& tiles,
                                               const Tile& tile, int32_t classes, Body& body) {
  constexpr int kSums = Gradients * N;
  static_assert(N % 2 == 0, "classes meet in shared memory in pairs");
  const auto memory = tile_memory<T, kSums>(tiles);
  const int32_t thread = threadIdx.x, threads = blockDim.x;
  const int32_t width = tile.column_end - tile.column, height = tile.row_end - tile.row;
  for (int32_t i = thread; i < width + 2; i += threads) {
    memory.column[i] = first_pixel(grid.x, tile.column - 1 + i);
  }
  for (int32_t i = thread; i < height + 2; i += threads) {
    memory.row[i] = first_pixel(grid.y, tile.row - 1 + i);
  }
  __syncthreads();
  const int32_t x_end = memory.column[width + 1];
  int32_t begin = memory.column[0];
  bool first_pass = true, last_pass = false;
  int32_t buffer = 0;
  while (!last_pass) { // mostly one pass: the tile is as wide as the block
    const int32_t end = smaller(begin + threads, x_end), x = begin + thread;
    last_pass = end == x_end;
    const bool active = x < end;
    if (active) {
      const Tap<T, int32_t> tap = tap_at(grid.x, x), weights = folded(tap);
      memory.weight0[thread] = weights.lower;
      memory.weight1[thread] = weights.upper;
      body.start(x, tap);
    }
    T upper[kSums], lower[kSums]; // of the thread's column, for cells `row` and `row + 1`
#pragma unroll
    for (int i = 0; i < kSums; ++i) upper[i] = lower[i] = T(0);
    int32_t y = memory.row[0];
    for (int32_t i = 0; i <= height; ++i) {
      const int32_t row = tile.row - 1 + i, y_end = memory.row[i + 1];
      for (; y < y_end; ++y) {
        const Tap<T, int32_t> tap = tap_in_cell(grid.y, y, row);
        T g[kSums];
        const unsigned some = active ? body.gradient(y, tap, g) : 0u;
#pragma unroll
        for (int of = 0; of < Gradients; ++of) {
          if ((some >> of & 1u) == 0u) continue;
#pragma unroll
          for (int k = of * N; k < (of + 1) * N; ++k) {
            upper[k] = fma(tap.lower, g[k], upper[k]);
            lower[k] = fma(tap.upper, g[k], lower[k]);
          }
        }
      }
      if (row == grid.y.in - 1) { // there is no next cell: both weights are those of the last
#pragma unroll
        for (int k = 0; k < kSums; ++k) upper[k] += lower[k];
      }
      if (i > 0) {
        Pack<T, 2>* const columns = memory.columns + buffer * (kSums / 2) * threads;
        if (memory.kBuffers == 1) __syncthreads(); // everyone has read the sums of the row before
#pragma unroll
        for (int pair = 0; pair < kSums / 2; ++pair) {
          columns[pair * threads + thread] = {{upper[2 * pair], upper[2 * pair + 1]}};
        }
        __syncthreads();
        buffer = memory.kBuffers - 1 - buffer;
        int32_t pair = 0, j = thread;
        for (; j >= width; j -= width) ++pair;
        while (pair < kSums / 2) {
          const Pack<T, 2> found =
              sums_of_cell(memory, columns + pair * threads, j, begin, end);
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            const int32_t value = 2 * pair + v, of = value / N, k = value - of * N;
            if (k >= classes) continue;
            T total = found.value[v];
            if (!tiles.one_pass) {
              T& so_far = memory.cells[(value * tiles.rows + i - 1) * tiles.columns + j];
              if (!first_pass) total += so_far;
              so_far = total;
            }
            if (last_pass) body.store(of, k, row, tile.column + j, total);
          }
          for (j += threads; j >= width; j -= width) ++pair;
        }
      }
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        upper[k] = lower[k];
        lower[k] = T(0);
      }
    }
    __syncthreads(); // before the next pass overwrites the weights
    first_pass = false;
    begin = end;
  }
}

} // namespace co2s::cuda
