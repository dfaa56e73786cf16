#include "ops/cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace co2s {

bool isa_supported(Isa isa) {
#if defined(CO2S_HAS_X86_VARIANTS)
  __builtin_cpu_init();
  switch (isa) {
  case Isa::kAvx512:
    return isa_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  case Isa::kAvx2:
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  default: return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

namespace {

Isa choose() {
  constexpr Isa best_first[] = {Isa::kAvx512, Isa::kAvx2, Isa::kBaseline};
  const char* wanted = std::getenv("CO2S_CPU_ISA");
  for (Isa isa : best_first) {
    if (wanted != nullptr && *wanted != '\0') {
      if (isa_name(isa) != wanted) continue;
      if (isa_supported(isa)) return isa;
      throw std::runtime_error("CO2S_CPU_ISA=" + isa_name(isa) + ": not supported by this CPU");
    }
    if (isa_supported(isa)) return isa;
  }
  throw std::runtime_error(std::string("CO2S_CPU_ISA=") + wanted +
                           ": expected baseline, avx2 or avx512");
}

} // namespace

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

std::string isa_name(Isa isa) {
  switch (isa) {
  case Isa::kAvx512: return "avx512";
  case Isa::kAvx2: return "avx2";
  default: return "baseline";
  }
}

std::vector<std::string> compiled_isas() {
#if defined(CO2S_HAS_X86_VARIANTS)
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

} // namespace co2s
