// What every CUDA launcher needs: the tensor's device and stream, a kernel's launch, and the choice of its types.
#pragma once

#include "arguments.h"
#include "cuda/scope.h"
#include "diffmas/device.cuh"

namespace diffmas {

/// f(T{}) for the element type T of `dtype`.
template <class F>
void with_storage_type(const char* name, ScalarType dtype, F f) {
  accumulation_dtype(name, dtype);
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      return f(Half{});
  }
}

/// The largest power of two, up to 16, that divides every address of the last dimension's rows of these tensors and
/// those rows' length, in bytes.
inline int64_t common_alignment(std::initializer_list<const Tensor*> tensors) {
  int64_t bits = 16;
  for (const Tensor* tensor : tensors) {
    const int64_t size = static_cast<int64_t>(tensor->element_size());
    bits |= reinterpret_cast<int64_t>(tensor->data_ptr());
    for (int64_t d = 0; d + 1 < tensor->dim(); ++d) bits |= tensor->size(d) > 1 ? tensor->stride(d) * size : 0;
    bits |= tensor->size(tensor->dim() - 1) * size;
  }
  return bits & -bits;
}

/// 16-bit data whose rows are 16-byte aligned: what the tensor-core kernels load.
inline bool suits_tensor_cores(std::initializer_list<const Tensor*> tensors) {
  return (*tensors.begin())->element_size() == 2 && common_alignment(tensors) == 16;
}

}  // namespace diffmas
