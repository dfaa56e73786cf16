// Rows of labels as the kernels read them: the class of a pixel that takes part, kNotTaken else.
#pragma once

#include "ops/cpu/rows.h"

namespace co2s::CO2S_ISA {
namespace {

// What decides which pixels take part, and with which class.
struct PixelMaps {
  MapView target, confidence, ignore_mask;
  BoxesView mix;
  int64_t ignore_index, classes, batch, width;
  double threshold;
};

struct PixelCounts {
  int64_t valid = 0, taken = 0;
};

// A run of a row that lies in one image: columns [begin, end) of row y.
struct Run {
  int64_t image, begin, end;
};

// The row's runs: before, inside and after the CutMix box.
struct Runs {
  Run runs[3];
  int count;
};

inline __attribute__((always_inline)) int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : (x > high ? high : x);
}

CO2S_INLINE Runs runs_of_row(const PixelMaps& maps, int64_t image, int64_t y) {
  if (maps.mix.boxes == nullptr) return {{{image, 0, maps.width}, {}, {}}, 1};
  const int32_t* box = maps.mix.boxes + 4 * image;
  const int64_t x1 = clamp(box[0], 0, maps.width), x2 = clamp(box[2], 0, maps.width);
  if (y < box[1] || y >= box[3] || x2 <= x1) return {{{image, 0, maps.width}, {}, {}}, 1};
  return {{{image, 0, x1}, {maps.mix.partner[image], x1, x2}, {image, x2, maps.width}}, 3};
}

// Calls body(pointer, stride) for a run of one map; stride 1 gets its own, vectorisable copy.
template <class S, class F>
CO2S_INLINE void with_run(const MapView& map, const Run& run, int64_t y, F body) {
  const S* from = static_cast<const S*>(map.data) + run.image * map.stride_b + y * map.stride_y +
                  run.begin * map.stride_x;
  if (map.stride_x == 1) {
    body(from, 1);
  } else {
    body(from, map.stride_x);
  }
}

template <class F>
CO2S_INLINE void with_integers(const MapView& map, const Run& run, int64_t y, F body) {
  switch (map.dtype) {
  case Dtype::kInt64: with_run<int64_t>(map, run, y, body); break;
  case Dtype::kInt32: with_run<int32_t>(map, run, y, body); break;
  default: with_run<uint8_t>(map, run, y, body);
  }
}

CO2S_INLINE void read_targets(const PixelMaps& maps, const Run& run, int64_t y, int32_t* labels) {
  const auto classes = static_cast<int32_t>(maps.classes);
  const int64_t ignore_index = maps.ignore_index;
  with_integers(maps.target, run, y, [&](const auto* from, int64_t stride) __attribute__((
                                         always_inline)) {
    for (int64_t i = 0; i < run.end - run.begin; ++i) {
      labels[run.begin + i] = checked_label(from[i * stride], classes, ignore_index);
    }
  });
}

CO2S_INLINE void apply_ignore_mask(const PixelMaps& maps, const Run& run, int64_t y,
                                   int32_t* labels) {
  with_integers(maps.ignore_mask, run, y, [&](const auto* from, int64_t stride) __attribute__((
                                              always_inline)) {
    for (int64_t i = 0; i < run.end - run.begin; ++i) {
      int32_t& label = labels[run.begin + i];
      label = static_cast<int64_t>(from[i * stride]) == maps.ignore_index ? kNotTaken : label;
    }
  });
}

// The number of pixels that remain.
template <class S>
CO2S_INLINE int64_t apply_confidence(const PixelMaps& maps, const Run& run, int64_t y,
                                     int32_t* labels) {
  const S threshold = static_cast<S>(maps.threshold);
  int32_t taken = 0;
  with_run<S>(maps.confidence, run, y, [&](const S* from, int64_t stride) __attribute__((
                                           always_inline)) {
    for (int64_t i = 0; i < run.end - run.begin; ++i) {
      const int32_t label = from[i * stride] >= threshold ? labels[run.begin + i] : kNotTaken;
      labels[run.begin + i] = label;
      taken += label >= 0;
    }
  });
  return taken;
}

struct LabelCounts {
  int32_t taken = 0, bad = 0;
};

CO2S_INLINE LabelCounts count_labels(const int32_t* labels, int64_t width) {
  LabelCounts counts;
  for (int64_t x = 0; x < width; ++x) {
    counts.taken += labels[x] >= 0;
    counts.bad += labels[x] == kOutOfRange;
  }
  return counts;
}

CO2S_INLINE int64_t target_at(const PixelMaps& maps, int64_t image, int64_t y, int64_t x) {
  int64_t value = 0;
  with_integers(maps.target, Run{image, x, x + 1}, y,
                [&](const auto* from, int64_t) { value = from[0]; });
  return value;
}

// Labels of row y of image `image`, read through its box. `labels` has room for kRowPadding more
// elements than the row, which stay kNotTaken.
[[maybe_unused]] PixelCounts read_label_row(const PixelMaps& maps, int64_t image, int64_t y,
                                            int32_t* labels, BadLabel* bad) {
  const Runs runs = runs_of_row(maps, image, y);
  for (int r = 0; r < runs.count; ++r) {
    read_targets(maps, runs.runs[r], y, labels);
    if (maps.ignore_mask.data != nullptr) apply_ignore_mask(maps, runs.runs[r], y, labels);
  }
  const LabelCounts found = count_labels(labels, maps.width);
  if (found.bad > 0) {
    for (int64_t x = 0; x < maps.width; ++x) {
      if (labels[x] != kOutOfRange) continue;
      int64_t source = image;
      for (int r = 0; r < runs.count; ++r) {
        if (x >= runs.runs[r].begin && x < runs.runs[r].end) source = runs.runs[r].image;
      }
      if (!bad->found) *bad = {true, target_at(maps, source, y, x), image, y, x};
      labels[x] = kNotTaken;
    }
  }
  PixelCounts counts{found.taken, found.taken};
  if (maps.confidence.data == nullptr) return counts;
  counts.taken = 0;
  for (int r = 0; r < runs.count; ++r) {
    counts.taken += maps.confidence.dtype == Dtype::kFloat64
                        ? apply_confidence<double>(maps, runs.runs[r], y, labels)
                        : apply_confidence<float>(maps, runs.runs[r], y, labels);
  }
  return counts;
}

} // namespace
} // namespace co2s::CO2S_ISA
