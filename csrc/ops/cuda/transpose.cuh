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

template <class T> struct TileMemory {
  T* columns;          // [gradients * classes, threads]: column sums of one row of cells
  T* cells;            // [gradients * classes, rows, columns]: sums so far, where several
                       // passes over the columns are needed
  T *weight0, *weight1; // [threads]: of a column's pixels in the cells index0 and index0 + 1
  int32_t* start;      // [columns + 2]: first pixel column of the interval before each cell
};

template <class T>
__device__ __forceinline__ TileMemory<T> tile_memory(const Tiles& tiles, int classes) {
  TileMemory<T> memory;
  memory.columns = reinterpret_cast<T*>(dynamic_shared());
  memory.cells = memory.columns + classes * tiles.threads;
  memory.weight0 = memory.cells + classes * tiles.rows * tiles.columns;
  memory.weight1 = memory.weight0 + tiles.threads;
  memory.start = reinterpret_cast<int32_t*>(memory.weight1 + tiles.threads);
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

// Σ over the pixel columns of this pass that read cell `j` of the tile, in the order of the
// columns: those between it and the cell before, then those between it and the next one.
template <class T>
__device__ __forceinline__ T sum_of_cell(const TileMemory<T>& memory, const T* columns, int32_t j,
                                         int32_t begin, int32_t end) {
  const auto inside = [&](int32_t x) { return x < begin ? begin : (x > end ? end : x); };
  const int32_t first = inside(memory.start[j]), own = inside(memory.start[j + 1]);
  const int32_t last = inside(memory.start[j + 2]);
  T sum = T(0);
  for (int32_t x = first; x < own; ++x) sum += memory.weight1[x - begin] * columns[x - begin];
  for (int32_t x = own; x < last; ++x) sum += memory.weight0[x - begin] * columns[x - begin];
  return sum;
}

// Body makes the gradients of pixels:
//   start(x, tap)             the thread's column of pixels; not called for idle threads
//   gradient(y, tap, g)       d/d logits [Gradients][N] of one pixel; false where all are 0
//   store(gradient, k, i, j, value)  one finished value of cell (i, j)
template <class T, int Gradients, int N, class Body>
__device__ __forceinline__ void transpose_tile(const Grid<T>& grid, const Tiles& tiles,
                                               const Tile& tile, int32_t classes, Body& body) {
  constexpr int kSums = Gradients * N;
  const TileMemory<T> memory = tile_memory<T>(tiles, kSums);
  const int32_t thread = threadIdx.x, threads = blockDim.x;
  const int32_t width = tile.column_end - tile.column;
  for (int32_t i = thread; i < width + 2; i += threads) {
    memory.start[i] = first_pixel(grid.x, tile.column - 1 + i);
  }
  __syncthreads();
  const int32_t first_row = first_pixel(grid.y, tile.row - 1);
  const int32_t x_end = memory.start[width + 1];
  int32_t begin = memory.start[0];
  bool first_pass = true, last_pass = false;
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
    int32_t y = first_row;
    for (int32_t row = tile.row - 1; row < tile.row_end; ++row) {
      for (; y < grid.y.out; ++y) {
        const Tap<T, int32_t> tap = tap_at(grid.y, y);
        if (tap.index0 != row) break;
        T g[kSums];
        if (active && body.gradient(y, tap, g)) {
          const Tap<T, int32_t> weights = folded(tap);
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            upper[i] = fma(weights.lower, g[i], upper[i]);
            lower[i] = fma(weights.upper, g[i], lower[i]);
          }
        }
      }
      if (row >= tile.row) {
        __syncthreads(); // everyone has read the sums of the row before
#pragma unroll
        for (int i = 0; i < kSums; ++i) memory.columns[i * threads + thread] = upper[i];
        __syncthreads();
        for (int32_t i = thread; i < kSums * width; i += threads) {
          const int32_t sums = i / width, j = i - sums * width;
          const int32_t of = sums / N, k = sums - of * N;
          if (k >= classes) continue;
          T total = sum_of_cell(memory, memory.columns + sums * threads, j, begin, end);
          T& so_far = memory.cells[(sums * tiles.rows + row - tile.row) * tiles.columns + j];
          if (!first_pass) total += so_far;
          if (last_pass) {
            body.store(of, k, row, tile.column + j, total);
          } else {
            so_far = total;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        upper[i] = lower[i];
        lower[i] = T(0);
      }
    }
    __syncthreads(); // before the next pass overwrites the weights
    first_pass = false;
    begin = end;
  }
}

} // namespace co2s::cuda
