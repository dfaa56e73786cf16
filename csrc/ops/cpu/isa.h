// Which compiled variant of the kernels serves this machine.
#pragma once

#include <string>
#include <vector>

namespace co2s {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best variant this CPU runs, or the one named by the environment variable CO2S_CPU_ISA
// (baseline, avx2, avx512; an error when unknown or not supported here). Read once.
Isa chosen_isa();
bool isa_supported(Isa isa);
std::string isa_name(Isa isa);
std::vector<std::string> compiled_isas();

} // namespace co2s

// Declares kernel `name` in the namespace of each variant that is compiled.
#if defined(CO2S_HAS_X86_VARIANTS)
#define CO2S_DECLARE_KERNEL(name, ...)                                                             \
  namespace baseline {                                                                             \
  void name(__VA_ARGS__);                                                                          \
  }                                                                                                \
  namespace avx2 {                                                                                 \
  void name(__VA_ARGS__);                                                                          \
  }                                                                                                \
  namespace avx512 {                                                                               \
  void name(__VA_ARGS__);                                                                          \
  }
#define CO2S_CALL_KERNEL(name, ...)                                                                \
  switch (::co2s::chosen_isa()) {                                                                  \
  case ::co2s::Isa::kAvx512: ::co2s::avx512::name(__VA_ARGS__); break;                             \
  case ::co2s::Isa::kAvx2: ::co2s::avx2::name(__VA_ARGS__); break;                                 \
  default: ::co2s::baseline::name(__VA_ARGS__);                                                    \
  }
#else
#define CO2S_DECLARE_KERNEL(name, ...)                                                             \
  namespace baseline {                                                                             \
  void name(__VA_ARGS__);                                                                          \
  }
#define CO2S_CALL_KERNEL(name, ...) ::co2s::baseline::name(__VA_ARGS__)
#endif
