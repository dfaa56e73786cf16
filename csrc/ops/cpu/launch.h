// Chooses the compiled variant of a kernel body by class count and geometry.
#pragma once

#include "ops/cpu/chunk.h"

namespace co2s::CO2S_ISA {
namespace {

// Calls Body<T, K, Identity>::run(args...). Small class counts are compiled in for float32: their
// loops unroll and stay in registers. Any other count runs the same code with K at run time.
template <template <class, int, bool> class Body, class T, bool Identity, class... Args>
void run_classes(int64_t classes, const Args&... args) {
  if constexpr (sizeof(T) == 4) {
    switch (classes) {
    case 6: return Body<T, 6, Identity>::run(args...);
#if !defined(CO2S_FEW_VARIANTS) // see CMakeLists.txt
    case 2: return Body<T, 2, Identity>::run(args...);
    case 5: return Body<T, 5, Identity>::run(args...);
    case 7: return Body<T, 7, Identity>::run(args...);
    case 8: return Body<T, 8, Identity>::run(args...);
#endif
    default: break;
    }
  }
  Body<T, 0, Identity>::run(args...);
}

template <template <class, int, bool> class Body, class T, class... Args>
void run_body(int64_t classes, bool identity, const Args&... args) {
  if (identity) {
    run_classes<Body, T, true>(classes, args...);
  } else {
    run_classes<Body, T, false>(classes, args...);
  }
}

} // namespace
} // namespace co2s::CO2S_ISA
