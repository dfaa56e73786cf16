// Runs the tests of one instruction set, or exits with 77 (skipped) where the CPU has not got it.
// A file of its own, because it must not be compiled for an instruction set that may be missing.
#include "ops/cpu/isa.h"

#define CO2S_TEXT_OF(x) #x
#define CO2S_TEXT(x) CO2S_TEXT_OF(x)

namespace co2s::CO2S_ISA {
int run();
}

int main() {
  for (const co2s::Isa isa : {co2s::Isa::kBaseline, co2s::Isa::kAvx2, co2s::Isa::kAvx512}) {
    if (co2s::isa_name(isa) == CO2S_TEXT(CO2S_ISA) && !co2s::isa_supported(isa)) return 77;
  }
  return co2s::CO2S_ISA::run();
}
