// Several vectors of pixels at once, stage by stage.
//
// One softmax is a long chain of dependent operations; done one vector after the other, the CPU
// mostly waits. Doing each stage for a few vectors keeps its units busy: twice as fast.
#pragma once

#include "ops/cpu/grid.h"

namespace co2s::CO2S_ISA {
namespace {

constexpr int kChunk = 4; // pixel vectors

// A vector of pixels (y, x ..).
struct Spot {
  int64_t y, x;
};

// The logits of a chunk: [kChunk][K].
template <class T, int K> class LogitsChunk {
public:
  using V = Vec<T>;

  explicit LogitsChunk(int64_t classes)
      : classes_(K > 0 ? K : static_cast<int>(classes)), values_(kChunk * classes) {}

  inline __attribute__((always_inline)) V* of(int i) { return values_.get() + i * classes(); }

  inline __attribute__((always_inline)) void subtract_max(int count) {
    for (int i = 0; i < count; ++i) co2s::subtract_max(of(i), classes());
  }

  // Replaces the logits, from which the maximum was subtracted, by their exponentials.
  inline __attribute__((always_inline)) void exponentiate(int count) {
    V* z = values_.get();
    for (int j = 0; j < count * classes(); ++j) z[j] = exp_nonpositive(z[j]);
  }

  inline __attribute__((always_inline)) V sum(int i) { return sum_of(of(i), classes()); }
  inline __attribute__((always_inline)) int classes() const { return K > 0 ? K : classes_; }

private:
  int classes_;
  ClassVector<V, kChunk * K> values_;
};

} // namespace
} // namespace co2s::CO2S_ISA
