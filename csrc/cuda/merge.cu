#include "diffmas/merge.cuh"

#include "cuda/launch.h"

namespace diffmas {

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses) {
  const ScalarType acc = check_merge(outs, lses);
  const int64_t tokens = outs.size(1), heads = outs.size(2), dim = outs.size(3);
  const Tensor out = new_tensor(outs, {tokens, heads, dim}, outs.scalar_type());
  const Tensor lse = new_tensor(outs, {tokens, heads}, acc);
  if (tokens * heads == 0) return {out, lse};
  const LaunchScope scope(outs);
  with_storage_type("outs", outs.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    scope.launch(
        "merge_states", merge_states_kernel<T>, dim3(divide_up(tokens * heads, MERGE_WARPS)), MERGE_THREADS, 0,
        trace<const T>(outs), trace<const Acc<T>>(lses), static_cast<T*>(out.data_ptr()),
        static_cast<Acc<T>*>(lse.data_ptr()), static_cast<int>(outs.size(0)), tokens, static_cast<int>(heads),
        static_cast<int>(dim));
  });
  return {out, lse};
}

}  // namespace diffmas
