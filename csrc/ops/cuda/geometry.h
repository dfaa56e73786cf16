// The grids of pixels and cells, and how the work on them is cut into blocks. Host and device.
#pragma once

#include "pixel_math.h"

namespace co2s::cuda {

// One axis of up(): `in` cells of the logits' grid, seen as `out` pixels.
template <class T> struct Axis {
  int32_t in, out;
  T scale;
  bool align_corners;
};

template <class T> struct Grid {
  Axis<T> y, x;
  bool equal; // up() is the identity
};

template <class T>
inline Axis<T> make_axis(int64_t in, int64_t out, bool align_corners) {
  return {static_cast<int32_t>(in), static_cast<int32_t>(out),
          interpolation_scale<T>(in, out, align_corners), align_corners};
}

template <class T>
inline Grid<T> make_grid(int64_t in_height, int64_t in_width, int64_t height, int64_t width,
                         bool align_corners) {
  return {make_axis<T>(in_height, height, align_corners),
          make_axis<T>(in_width, width, align_corners), in_height == height && in_width == width};
}

template <class T> CO2S_HD Tap<T, int32_t> tap_at(const Axis<T>& axis, int32_t i) {
  return interpolation_tap<T, int32_t>(i, axis.in, axis.scale, axis.align_corners);
}

// The tap of pixel i, known to read `cell` and the next one.
template <class T>
CO2S_HD Tap<T, int32_t> tap_in_cell(const Axis<T>& axis, int32_t i, int32_t cell) {
  return tap_from(interpolation_source(i, axis.scale, axis.align_corners), cell, axis.in);
}

// The first pixel that reads from `cell` on, `out` when there is none. index0 never falls along
// the axis, whatever the rounding, so the search is exact.
template <class T> CO2S_HD int32_t first_pixel(const Axis<T>& axis, int32_t cell) {
  int32_t begin = 0, end = axis.out;
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (tap_at(axis, middle).index0 >= cell) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

CO2S_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CO2S_HD int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

// ---- forward: equal grids, vectors of pixels; upsampling, columns of pixels -------------------

constexpr int kThreads = 256;
constexpr int kColumns = 32;      // of pixels in a block: a warp's width
constexpr int kRowsPerThread = 8; // pixels below each other that one thread visits

struct PixelBlocks {
  int32_t a_row, an_image; // 32 bits: a division of 64 takes a GPU as long as a pixel's softmax
  int64_t all;
};

// Equal grids: `vectors` of pixels an image, one a thread.
inline PixelBlocks equal_blocks(int64_t batch, int64_t vectors) {
  const int64_t an_image = ceil_div(vectors, kThreads);
  return {0, static_cast<int32_t>(an_image), batch * an_image};
}

inline PixelBlocks column_blocks(int64_t batch, int64_t height, int64_t width) {
  const int64_t a_row = ceil_div(width, kColumns);
  const int64_t rows = ceil_div(height, (kThreads / kColumns) * kRowsPerThread);
  return {static_cast<int32_t>(a_row), static_cast<int32_t>(a_row * rows), batch * a_row * rows};
}

// ---- backward: tiles of cells, each walked over the pixels that read them ---------------------

constexpr int kTileThreads = 192; // at most; a thread owns a column of pixels
constexpr int kMostCells = 64;    // a tile's width at most

// Tiles that a multiprocessor is to work on at a time, of one student with so many values a pixel.
// Three of 6 warps leave 96 registers a thread; without the bound there would be room for two.
constexpr int blocks_at_once(int values) { return values <= 8 ? 3 : 1; }

// So many tiles at least, where the rows allow: what 128 multiprocessors hold at once. A pair of
// students takes 150 registers a thread, which leaves room for two tiles.
constexpr int64_t enough_tiles(int gradients) { return 128 * (gradients == 1 ? 3 : 2); }

// Blocks of `rows` x `columns` cells; pixels that read cells of two tiles are visited by both.
struct Tiles {
  int32_t rows, columns;       // cells of a tile
  int32_t down, across;        // tiles of an image
  int32_t threads;             // of a block
  int32_t chunks;              // of classes
  bool one_pass;               // whether a tile has a thread for each column of pixels
};

struct Tile {
  int32_t row, row_end, column, column_end; // cells
  int32_t chunk;
  int64_t image;
};

CO2S_HD Tile tile_of_block(const Tiles& tiles, int32_t height, int32_t width, int32_t block) {
  Tile tile;
  const int32_t across = block / tiles.across, down = across / tiles.down;
  tile.column = (block - across * tiles.across) * tiles.columns;
  tile.row = (across - down * tiles.down) * tiles.rows;
  tile.chunk = down % tiles.chunks;
  tile.image = down / tiles.chunks;
  tile.row_end = smaller(tile.row + tiles.rows, height);
  tile.column_end = smaller(tile.column + tiles.columns, width);
  return tile;
}

// The most pixel columns that a tile of `columns` cells visits.
template <class T> inline int32_t widest_tile(const Axis<T>& x, int32_t columns) {
  int32_t widest = 0;
  for (int32_t cell = 0; cell < x.in; cell += columns) {
    const int32_t begin = first_pixel(x, cell - 1);
    const int32_t end = first_pixel(x, smaller(cell + columns, x.in));
    widest = widest > end - begin ? widest : end - begin;
  }
  return widest;
}

// Sums of columns in shared memory twice, so that those of a row of cells are read while the next
// are made; once where that would be too much.
constexpr int column_buffers(int values, size_t item) { return values * item <= 96 ? 2 : 1; }

// Shared memory of a block, in bytes: the column sums of one row of cells or two, the sums of the
// tile's cells where several passes add to them, the weights of the pixel columns, where each cell's
// rows and columns of pixels begin.
inline size_t tile_bytes(const Tiles& tiles, int classes, int gradients, size_t item) {
  const size_t values = static_cast<size_t>(classes) * gradients;
  const size_t columns = values * tiles.threads * column_buffers(classes * gradients, item);
  const size_t cells = tiles.one_pass ? 0 : values * tiles.rows * tiles.columns;
  return (columns + cells + 2 * tiles.threads) * item +
         (tiles.rows + tiles.columns + 4) * sizeof(int32_t);
}

// `classes` are those a block handles, `gradients` how many gradients it makes. It depends on the
// shapes alone, so that the order of additions does.
template <class T>
inline Tiles make_tiles(const Grid<T>& grid, int64_t batch, int64_t all_classes, int classes,
                        int gradients) {
  constexpr size_t kShared = 48 * 1024;
  const auto [y, x, equal] = grid;
  Tiles tiles;
  tiles.chunks = static_cast<int32_t>(ceil_div(all_classes, classes));
  int64_t columns = static_cast<int64_t>(kTileThreads) * x.in / x.out - 1;
  columns = columns < 1 ? 1 : (columns > kMostCells ? kMostCells : columns);
  columns = columns > x.in ? x.in : columns;
  while (columns > 1 && widest_tile(x, static_cast<int32_t>(columns)) > kTileThreads) --columns;
  tiles.across = static_cast<int32_t>(ceil_div(x.in, columns));
  tiles.columns = static_cast<int32_t>(ceil_div(x.in, tiles.across)); // equally wide
  tiles.across = static_cast<int32_t>(ceil_div(x.in, tiles.columns));
  const int64_t widest = widest_tile(x, tiles.columns);
  const int64_t threads = ceil_div(widest < 1 ? 1 : widest, 32) * 32;
  tiles.threads = static_cast<int32_t>(threads < kTileThreads ? threads : kTileThreads);
  tiles.one_pass = widest <= tiles.threads;
  for (tiles.rows = 8; tiles.rows > 1; --tiles.rows) {
    tiles.down = static_cast<int32_t>(ceil_div(y.in, tiles.rows));
    const int64_t blocks = batch * tiles.chunks * tiles.down * tiles.across;
    const bool fits = tile_bytes(tiles, classes, gradients, sizeof(T)) <= kShared;
    if (fits && (blocks >= enough_tiles(gradients) || tiles.rows <= 2)) break;
  }
  tiles.down = static_cast<int32_t>(ceil_div(y.in, tiles.rows));
  return tiles;
}

inline int64_t count_tiles(const Tiles& tiles, int64_t batch) {
  return batch * tiles.chunks * tiles.down * tiles.across;
}

} // namespace co2s::cuda
