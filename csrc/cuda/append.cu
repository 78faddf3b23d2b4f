#include "diffmas/append.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace diffmas {

namespace {

/// The widest power-of-two vector, up to 16 bytes, to whose size every address of these tensors is aligned.
int64_t common_alignment(std::initializer_list<const Tensor*> tensors) {
  int64_t bits = 16;
  for (const Tensor* tensor : tensors) {
    const int64_t size = static_cast<int64_t>(tensor->element_size());
    bits |= reinterpret_cast<int64_t>(tensor->data_ptr());
    for (int64_t d = 0; d + 1 < tensor->dim(); ++d) bits |= tensor->size(d) > 1 ? tensor->stride(d) * size : 0;
    bits |= tensor->size(tensor->dim() - 1) * size;
  }
  return bits & -bits;
}

template <class T>
Packed<T> packed_as(const Tensor& tensor, int64_t elements) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0) / elements, tensor.stride(1) / elements};
}

template <class T>
Trace<T> trace_as(const Tensor& tensor, int64_t elements) {
  return {
      static_cast<T*>(tensor.data_ptr()), tensor.stride(0) / elements, tensor.stride(1) / elements,
      tensor.stride(2) / elements};
}

}  // namespace

void kv_append(
    const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const Tensor& q_begin,
    const Tensor& q_end, const Tensor& starts, int64_t max_new) {
  check_append(k, v, keys, values, q_begin, q_end, starts, max_new);
  const int64_t batch = keys.size(0), heads = keys.size(1), size = static_cast<int64_t>(keys.element_size());
  if (batch * heads * max_new * keys.size(3) == 0) return;
  const LaunchScope scope(keys);
  const auto launch = [&](auto vector) {
    using V = decltype(vector);
    const int64_t elements = sizeof(V) / size;
    const int width = static_cast<int>(keys.size(3) / elements);
    const dim3 grid((max_new + APPEND_TOKENS - 1) / APPEND_TOKENS, heads, batch);
    const int64_t work = std::min<int64_t>(max_new, APPEND_TOKENS) * width;
    const int threads = static_cast<int>(std::min<int64_t>(256, (work + 31) / 32 * 32));
    append_kernel<V><<<grid, threads, 0, scope.stream>>>(
        packed_as<const V>(k, elements), packed_as<const V>(v, elements), trace_as<V>(keys, elements),
        trace_as<V>(values, elements), row_ranges(q_begin, q_end, starts), width);
  };
  switch (common_alignment({&k, &v, &keys, &values})) {
    case 16: launch(int4{}); break;
    case 8: launch(int2{}); break;
    case 4: launch(int{}); break;
    default: launch(short{}); break;
  }
  scope.check("kv_append");
}

}  // namespace diffmas
