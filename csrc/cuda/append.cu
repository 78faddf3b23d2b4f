#include "diffmas/append.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace diffmas {

namespace {

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

int whole_warps(int64_t work) { return static_cast<int>(std::min<int64_t>(256, (work + 31) / 32 * 32)); }

template <class S, class T, int N>
void launch_gather(
    const LaunchScope& scope, const Tensor& keys, const Tensor& values, const Tensor& k, const Tensor& v,
    const RowRanges& rows) {
  const int batch = static_cast<int>(keys.size(0)), heads = static_cast<int>(keys.size(1));
  const int width = static_cast<int>(keys.size(3) / N);
  scope.launch(
      "kv_gather", gather_kernel<S, T, N>, dim3(k.size(0)), whole_warps(heads * width), 0, trace<const S>(keys),
      trace<const S>(values), packed<T>(k), packed<T>(v), rows, batch, heads, width);
}

}  // namespace

void kv_append(const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const Rows& rows) {
  check_append(k, v, keys, values, rows);
  const int64_t max_seqlen_q = rows.max_seqlen_q;
  const int64_t batch = keys.size(0), heads = keys.size(1), size = static_cast<int64_t>(keys.element_size());
  if (batch * heads * max_seqlen_q * keys.size(3) == 0) return;
  const LaunchScope scope(keys);
  const auto launch = [&](auto vector) {
    using V = decltype(vector);
    const int64_t elements = sizeof(V) / size;
    const int width = static_cast<int>(keys.size(3) / elements);
    const dim3 grid(divide_up(max_seqlen_q, APPEND_TOKENS), heads, batch);
    scope.launch(
        "kv_append", append_kernel<V>, grid, whole_warps(std::min<int64_t>(max_seqlen_q, APPEND_TOKENS) * width), 0,
        packed_as<const V>(k, elements), packed_as<const V>(v, elements), trace_as<V>(keys, elements),
        trace_as<V>(values, elements), rows.ranges(), width);
  };
  switch (common_alignment({&k, &v, &keys, &values})) {
    case 16:
      return launch(int4{});
    case 8:
      return launch(int2{});
    case 4:
      return launch(int{});
    default:
      return launch(short{});
  }
}

std::tuple<Tensor, Tensor> kv_gather(
    const Tensor& keys, const Tensor& values, const Rows& given, int64_t total, ScalarType dtype) {
  check_gather(keys, values, given, total, dtype);
  const int64_t heads = keys.size(1), dim = keys.size(3);
  const Tensor k = new_tensor(keys, {total, heads, dim}, dtype), v = new_tensor(keys, {total, heads, dim}, dtype);
  if (total * heads * dim == 0) return {k, v};
  const LaunchScope scope(keys);
  const bool aligned = common_alignment({&keys, &values, &k, &v}) == 16;
  const RowRanges rows = given.ranges();
  with_storage_type("keys", keys.scalar_type(), [&](auto source) {
    using S = decltype(source);
    with_storage_type("dtype", dtype, [&](auto target) {
      using T = decltype(target);
      if constexpr (std::is_same_v<Acc<S>, Acc<T>>)
        aligned ? launch_gather<S, T, 16 / std::max(sizeof(S), sizeof(T))>(scope, keys, values, k, v, rows)
                : launch_gather<S, T, 1>(scope, keys, values, k, v, rows);
    });
  });
  return {k, v};
}

}  // namespace diffmas
