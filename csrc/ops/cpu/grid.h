// Virtual upsampling: logits of V neighbouring pixels on the label grid, computed when they are
// needed, and the way back for their gradients.
//
// Work goes through the output rows of a band in groups that lie between the same two source rows.
// For one group and one vector of columns the source rows are interpolated along x once (`open`),
// and each output row is then a blend of the two (`read`). Gradients go the same way back: two sums
// per column (`add`), which are brought to the source columns once per source row (`advance`,
// `finish_band`). No row of the full-resolution gradient is ever stored.
#pragma once

#include "ops/cpu/rows.h"
#include "ops/upsampling_plan.h"

namespace co2s::CO2S_ISA {
namespace {

constexpr int64_t kMaxGroupRows = 8;
// Elements. On equal grids K planes are read side by side, and the CPU's own prefetcher begins anew
// at every page of each; where pixels take arithmetic, too, it falls behind.
constexpr int64_t kReadAhead = 512;

template <class T> int64_t padded_width(const PlanView<T>& plan) {
  return (plan.width + plan.footprint + 2 * kRowPadding) / 16 * 16;
}

// K values per pixel vector: K = 0 means known at run time only, and in memory.
template <class V, int K> struct ClassVector {
  V values[K];
  explicit ClassVector(int64_t) {}
  V* get() { return values; }
};
template <class V> struct ClassVector<V, 0> {
  Buffer<V> values;
  explicit ClassVector(int64_t classes) : values(classes) {}
  V* get() { return values.get(); }
};

// Rows [begin, end) between source rows low and high.
struct RowGroup {
  int64_t begin, end, low, high;
};

template <class T> RowGroup next_group(const PlanView<T>& plan, int64_t begin, int64_t band_end) {
  if (plan.identity) return {begin, begin + 1, begin, begin};
  const int64_t low = plan.y_index0[begin];
  int64_t end = begin + 1;
  while (end < band_end && end - begin < kMaxGroupRows && plan.y_index0[end] == low) ++end;
  return {begin, end, low, low + 1 < plan.in_height ? low + plan.next_row : low};
}

// The logits of one image.
template <class T, int K, bool Identity> class LogitsSource {
public:
  using V = Vec<T>;

  LogitsSource(const LogitsView& logits, const PlanView<T>& plan)
      : logits_(logits), plan_(plan), classes_(K > 0 ? K : static_cast<int>(logits.classes)),
        direct_(Identity && logits.stride_x == 1 &&
                logits.dtype == (sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64)),
        row_size_(plan.in_width + kRowPadding), rows_(direct_ ? 0 : 2 * classes_ * row_size_),
        low_(Identity ? 0 : classes_), high_(Identity ? 0 : classes_) {}

  void start_image(int64_t image) {
    image_ = image;
    loaded_[0] = loaded_[1] = -1;
  }

  // Makes the group's source rows available.
  void load(const RowGroup& group) {
    if (direct_) {
      base_ = static_cast<const T*>(logits_.data) + image_ * logits_.stride_b +
              group.low * logits_.stride_y;
      class_stride_ = logits_.stride_k;
      return;
    }
    class_stride_ = row_size_;
    base_ = load_row(group.low, group.high);
    if constexpr (!Identity) high_base_ = load_row(group.high, group.low);
  }

  // Prepares the columns x .. of the group for `read`.
  inline __attribute__((always_inline)) void open(int64_t x) {
    if constexpr (!Identity) interpolate_columns(x);
  }

  // Logits of the pixels (y, x ..): zero where `mask` is not set, whatever is stored there.
  inline __attribute__((always_inline)) void read(int64_t y, int64_t x, IntVec<T> mask, V* z) {
    if constexpr (Identity) {
      const int64_t left = plan_.width - x;
      for (int k = 0; k < classes(); ++k) {
        const T* from = base_ + k * class_stride_ + x;
        if (direct_) __builtin_prefetch(from + kReadAhead);
        z[k] = keep(mask, left >= V::kLanes ? co2s::CO2S_ISA::load(from)
                                            : load_partial(from, left));
      }
    } else {
      const V lower(plan_.y_lower[y]), upper(plan_.y_upper[y]);
      const V *low = low_.get(), *high = high_.get();
      for (int k = 0; k < classes(); ++k) z[k] = keep(mask, low[k] * lower + high[k] * upper);
    }
  }

  inline __attribute__((always_inline)) int classes() const { return K > 0 ? K : classes_; }

private:
  const T* load_row(int64_t row, int64_t other) {
    const int slot = loaded_[0] == row || (loaded_[1] != row && loaded_[1] == other) ? 0 : 1;
    T* to = rows_.get() + slot * classes_ * row_size_;
    if (loaded_[slot] == row) return to;
    loaded_[slot] = row;
    for (int k = 0; k < classes_; ++k, to += row_size_) {
      const int64_t offset =
          image_ * logits_.stride_b + k * logits_.stride_k + row * logits_.stride_y;
      read_row(logits_.data, logits_.dtype, offset, logits_.stride_x, plan_.in_width, to);
      // The last column repeats, so that the upper neighbour always exists.
      for (int64_t i = plan_.in_width; i < row_size_; ++i) to[i] = to[plan_.in_width - 1];
    }
    return rows_.get() + slot * classes_ * row_size_;
  }

  inline __attribute__((always_inline)) void interpolate_columns(int64_t x) {
    const int32_t* index = plan_.x_index0 + x;
    const int64_t first = index[0];
    const bool near = index[V::kLanes - 1] - first < V::kLanes;
    const IntVec<T> offset =
        IntVec<T>::make(load_int<T>(index).v - static_cast<typename Lane<T>::Int>(first));
    const V lower = co2s::CO2S_ISA::load(plan_.x_lower + x);
    const V upper = co2s::CO2S_ISA::load(plan_.x_upper + x);
    V *low = low_.get(), *high = high_.get();
    const T* from = base_ + first;
    const T* from_high = high_base_ + first;
    const int64_t next = plan_.next_column;
    if (near) {
      for (int k = 0; k < classes(); ++k, from += row_size_, from_high += row_size_) {
        low[k] = take(from, offset, true) * lower + take(from + next, offset, true) * upper;
        high[k] =
            take(from_high, offset, true) * lower + take(from_high + next, offset, true) * upper;
      }
    } else {
      for (int k = 0; k < classes(); ++k, from += row_size_, from_high += row_size_) {
        low[k] = take(from, offset, false) * lower + take(from + next, offset, false) * upper;
        high[k] =
            take(from_high, offset, false) * lower + take(from_high + next, offset, false) * upper;
      }
    }
  }

  LogitsView logits_;
  PlanView<T> plan_;
  int classes_;
  bool direct_;
  int64_t row_size_, class_stride_ = 0, image_ = 0;
  Buffer<T> rows_; // two slots of [K][row_size]
  int64_t loaded_[2] = {-1, -1};
  const T *base_ = nullptr, *high_base_ = nullptr;
  ClassVector<V, Identity ? 1 : K> low_, high_;
};

// Where the gradient of one logits tensor goes. `gradient` is contiguous [B,K,h,w]: of `dtype` on
// equal grids, else of T. Bands meet in one source row: the earlier band leaves its part of it in
// border [B,bands,K,w], which add_borders adds when all bands are done.
struct GradientView {
  void* gradient;
  Dtype dtype;
  void* border;
};

template <class T, int K, bool Identity> class GradientSink {
public:
  using V = Vec<T>;

  GradientSink(const GradientView& view, const PlanView<T>& plan, int64_t classes)
      : view_(view), plan_(plan), classes_(K > 0 ? K : static_cast<int>(classes)),
        row_size_(padded_width(plan)),
        direct_(Identity && view.dtype == (sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64)),
        past_cache_(direct_ && plan.width % V::kLanes == 0 &&
                    reinterpret_cast<uintptr_t>(view.gradient) % kVectorBytes == 0),
        enabled_(view.gradient != nullptr),
        rows_(enabled_ && !direct_ ? 2 * classes_ * row_size_ : 0) {
    low_row_ = rows_.get();
    high_row_ = low_row_ + classes_ * row_size_;
  }

  bool enabled() const { return enabled_; }

  void start_band(int64_t image, int64_t band) {
    image_ = image;
    band_ = band;
    group_ = {0, 0, -1, -1};
  }

  // Moves on to a group; source rows left behind are complete.
  void advance(const RowGroup& group) {
    if constexpr (!Identity) {
      if (group_.low >= 0 && group.low != group_.low) {
        flush(low_row_, group_.low, false);
        if (group.low == group_.high) {
          T* row = low_row_;
          low_row_ = high_row_;
          high_row_ = row;
        } else if (group_.high != group_.low) {
          flush(high_row_, group_.high, false);
        }
      }
    }
    group_ = group;
  }

  // Adds to the columns x .. of class k: a gradient and its share of the group's upper source row.
  // The lower row gets the rest, as the two weights of an output row add up to 1.
  inline __attribute__((always_inline)) void add(int64_t x, int k, V total, V to_high) {
    T* low = low_row_ + k * row_size_ + x;
    T* high = (group_.high == group_.low ? low_row_ : high_row_) + k * row_size_ + x;
    store(low, load(low) + (total - to_high));
    store(high, load(high) + to_high);
  }

  // Equal grids: sets the pixels x .. of the group's row.
  inline __attribute__((always_inline)) void put(int64_t x, int k, V slope) {
    if (direct_) {
      T* to = static_cast<T*>(view_.gradient) +
              ((image_ * classes() + k) * plan_.height + group_.low) * plan_.width + x;
      const int64_t left = plan_.width - x;
      if (past_cache_) {
        store_past_cache(to, slope);
      } else if (left >= V::kLanes) {
        store(to, slope);
      } else {
        store_partial(to, slope, left);
      }
    } else {
      store(low_row_ + k * row_size_ + x, slope);
    }
  }

  // Equal grids: the pixels x .. have no gradient.
  inline __attribute__((always_inline)) void put_zeros(int64_t x) {
    for (int k = 0; k < classes(); ++k) put(x, k, V(T(0)));
  }

  // The row is done (equal grids only): rounds it to the gradient's dtype.
  void finish_row() {
    if constexpr (Identity) {
      if (direct_) return;
      for (int k = 0; k < classes_; ++k) {
        write_row(low_row_ + k * row_size_, plan_.width, view_.gradient, view_.dtype,
                  ((image_ * classes_ + k) * plan_.height + group_.low) * plan_.width);
      }
    }
  }

  void finish_band() {
    if constexpr (Identity) {
      if (past_cache_) fence_stores();
    } else {
      if (group_.low < 0) return;
      const bool shared = band_ + 1 < plan_.bands &&
                          plan_.y_index0[plan_.band_begin[band_ + 1]] == group_.high;
      if (group_.high != group_.low) flush(high_row_, group_.high, shared);
      flush(low_row_, group_.low, false);
    }
  }

  inline __attribute__((always_inline)) int classes() const { return K > 0 ? K : classes_; }

private:
  // The transpose of the interpolation along x, into one source row; leaves zeros behind.
  void flush(T* rows, int64_t row, bool to_border) {
    const int64_t w = plan_.in_width, footprint = plan_.footprint;
    for (int k = 0; k < classes_; ++k, rows += row_size_) {
      T* to = to_border
                  ? static_cast<T*>(view_.border) +
                        ((image_ * plan_.bands + band_) * classes_ + k) * w
                  : static_cast<T*>(view_.gradient) +
                        ((image_ * classes_ + k) * plan_.in_height + row) * w;
      int64_t j = 0;
#if defined(__AVX2__)
      if constexpr (sizeof(T) == 4) {
        for (; j + 8 <= w; j += 8) {
          eight_dots(rows, plan_.x_start + j, plan_.x_weight + j * footprint, footprint, to + j);
        }
      }
#endif
      for (; j < w; ++j) {
        to[j] = dot(rows + plan_.x_start[j], plan_.x_weight + j * footprint, footprint);
      }
      std::memset(static_cast<void*>(rows), 0, row_size_ * sizeof(T));
    }
  }

  CO2S_INLINE T dot(const T* a, const T* b, int64_t count) {
    if constexpr (V::kLanes <= 8) {
      V sum = co2s::CO2S_ISA::load(a) * co2s::CO2S_ISA::load(b);
      for (int64_t i = V::kLanes; i < count; i += V::kLanes) {
        sum = sum + co2s::CO2S_ISA::load(a + i) * co2s::CO2S_ISA::load(b + i);
      }
      return add_lanes(sum);
    } else { // a footprint of 8 is half a vector
      V sum(T(0));
      for (int64_t i = 0; i < count; i += V::kLanes) {
        const int64_t left = count - i;
        sum = sum + (left >= V::kLanes
                         ? co2s::CO2S_ISA::load(a + i) * co2s::CO2S_ISA::load(b + i)
                         : load_partial(a + i, left) * load_partial(b + i, left));
      }
      return add_lanes(sum);
    }
  }

  GradientView view_;
  PlanView<T> plan_;
  int classes_;
  int64_t row_size_, image_ = 0, band_ = 0;
  bool direct_, past_cache_, enabled_;
  Buffer<T> rows_; // two of [K][row_size]
  T *low_row_, *high_row_;
  RowGroup group_ = {0, 0, -1, -1};
};

} // namespace
} // namespace co2s::CO2S_ISA
