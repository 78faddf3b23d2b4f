#include "diffmas/attention_forward.cuh"
#include "diffmas/attention_simple.cuh"

#include "cuda/attention.h"

namespace diffmas {

std::tuple<Tensor, Tensor> cached_attention(
    const Tensor& q, const OptionalTensor& k, const OptionalTensor& v, const Tensor& keys, const Tensor& values,
    const Rows& rows, const Scores& scores) {
  check_cached_attention(q, k, v, keys, values, rows, scores);
  const AttentionCall call{"cached_attention", q, keys, values, rows, scores};
  call.check();
  const Tensor out = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  const Tensor lse = new_tensor(q, {q.size(0), q.size(1)}, accumulation_dtype("q", q.scalar_type()));
  if (call.empty()) return {out, lse};
  const LaunchScope scope(q);
  const bool tensor_cores = call.tensor_cores(scope, sizeof(ForwardShared<Half, 256, 1>), {&out});
  const bool appends = tensor_cores && k && rows.max_seqlen_q == 1;
  if (k && !appends) kv_append(*k, *v, keys, values, rows);

  const auto run = [&](auto storage, auto kernel, int tile_rows, int threads, size_t shared) {
    using T = decltype(storage);
    const SplitWork work(scope, call, tile_rows, true);
    ForwardArguments<T> a{call.inputs<T>(work.plan)};
    if (appends) a.appended = {packed<const T>(*k), packed<const T>(*v), trace<T>(keys), trace<T>(values)};
    a.out = packed<T>(out);
    a.lse = packed<Acc<T>>(lse);
    a.partials = work.partials<Acc<T>>(call);
    scope.launch(call.name, kernel, work.grid, threads, shared, a);
    work.merge(scope, call, a.out, a.lse);
  };
  if (tensor_cores)
    with_half_type(q.scalar_type(), [&](auto storage) {
      using T = decltype(storage);
      with_head_dim(call.dim(), [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        if (call.packed_rows() <= FEW_ROWS)
          run(storage, attention_forward_kernel<T, D, 1>, FEW_ROWS, 128, sizeof(ForwardShared<T, D, 1>));
        else
          run(storage, attention_forward_kernel<T, D, 4>, MANY_ROWS, 128, sizeof(ForwardShared<T, D, 4>));
      });
    });
  else
    with_storage_type("q", q.scalar_type(), [&](auto storage) {
      using T = decltype(storage);
      run(storage, attention_forward_simple_kernel<T>, SIMPLE_ROWS, SIMPLE_THREADS,
          simple_shared_elements<T>(static_cast<int>(call.dim()), 2, 2) * sizeof(Acc<T>));
    });
  return {out, lse};
}

}  // namespace diffmas
