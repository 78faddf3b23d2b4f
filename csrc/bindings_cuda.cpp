// Registration of the CUDA implementations.
#include "registration.h"

STABLE_TORCH_LIBRARY_IMPL(diffmas, CUDA, m) { diffmas::flat::register_operators(m); }
