// Registration of the CUDA implementations: one line per operator that a file of csrc/cuda implements.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(diffmas, CUDA, m) {
  m.impl("kv_append", TORCH_BOX(&diffmas::kv_append));
}
