#include "cpu/dispatch.h"

#include <cstdlib>

namespace diffmas {

namespace {

InstructionSet best() {
#if defined(DIFFMAS_X86)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return InstructionSet::Baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? InstructionSet::Avx512 : InstructionSet::Avx2;
#else
  return InstructionSet::Baseline;
#endif
}

InstructionSet chosen() {
  const InstructionSet available = best();
  const char* variable = std::getenv("DIFFMAS_ISA");
  if (variable == nullptr) return available;
  const char* const names[] = {"baseline", "avx2", "avx512"};
  std::string allowed;
  for (int i = 0; i <= static_cast<int>(available); ++i) {
    if (std::string(variable) == names[i]) return static_cast<InstructionSet>(i);
    allowed += std::string(i == 0 ? "" : ", ") + names[i];
  }
  STD_TORCH_CHECK(false, "DIFFMAS_ISA is ", variable, "; allowed on this machine: ", allowed);
  return available;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet set = chosen();
  return set;
}

}  // namespace diffmas
