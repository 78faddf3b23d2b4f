// Choice of the kernels: by the machine's instruction set and by the tensors' dtype.
#pragma once

#include "arguments.h"
#include "cpu/kernels.h"

namespace diffmas {

enum class InstructionSet { Baseline, Avx2, Avx512 };

/// The best one this machine has, or the one that the environment variable DIFFMAS_ISA names.
InstructionSet instruction_set();

/// The kernel of this name compiled for this machine, e.g. DIFFMAS_KERNEL(attend<S>).
#if defined(DIFFMAS_X86)
#define DIFFMAS_KERNEL(...)                                           \
  (instruction_set() == InstructionSet::Avx512 ? &avx512::__VA_ARGS__ \
   : instruction_set() == InstructionSet::Avx2 ? &avx2::__VA_ARGS__   \
                                               : &baseline::__VA_ARGS__)
#else
#define DIFFMAS_KERNEL(...) (&baseline::__VA_ARGS__)
#endif

/// Calls f with a value of the storage type of `dtype`.
template <class F>
auto with_storage_type(const char* name, ScalarType dtype, const F& f) {
  accumulation_dtype(name, dtype);
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      return f(float{});
  }
}

}  // namespace diffmas
