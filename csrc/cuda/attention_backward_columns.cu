#include "diffmas/attention_backward_columns.cuh"
#include "diffmas/attention_simple.cuh"

#include "cuda/attention.h"

namespace diffmas {

void cached_attention_backward_columns(
    const Tensor& grad_out, const Tensor& q, const Tensor& lse, const Tensor& delta, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Rows& rows, const Columns& columns,
    const Scores& scores) {
  check_backward_columns(grad_out, q, lse, delta, keys, values, grad_keys, grad_values, rows, columns, scores);
  const AttentionCall call{"cached_attention_backward_columns", q, keys, values, rows, scores};
  call.check();
  if (call.empty() || rows.max_seqlen_k == 0) return;
  const LaunchScope scope(q);
  const auto launch = [&](auto storage, auto kernel, int tile_columns, int threads, size_t shared) {
    using T = decltype(storage);
    using A = Acc<T>;
    ColumnsArguments<T> a{call.inputs<T>(call.unsplit())};
    a.grad_out = packed<const T>(grad_out);
    a.lse = packed<const A>(lse);
    a.delta = packed<const A>(delta);
    a.grad_keys = trace<A>(grad_keys);
    a.grad_values = trace<A>(grad_values);
    a.column_begin = indices(columns.begin);
    a.column_end = indices(columns.end);
    const dim3 grid(divide_up(rows.max_seqlen_k, tile_columns), call.kv_heads(), call.batch());
    scope.launch(call.name, kernel, grid, threads, shared, a);
  };
  // Accumulators are updated two neighbours at a time.
  if (call.tensor_cores(scope, sizeof(ColumnsShared<Half, 256>), {&grad_out}) &&
      common_alignment({&grad_keys, &grad_values}) >= 8)
    with_half_type(q.scalar_type(), [&](auto storage) {
      using T = decltype(storage);
      with_head_dim(call.dim(), [&](auto dim) {
        constexpr int D = decltype(dim)::value;
        launch(
            storage, attention_backward_columns_kernel<T, D>, ColumnTiles<D>::COLUMNS, ColumnTiles<D>::THREADS,
            sizeof(ColumnsShared<T, D>));
      });
    });
  else
    with_storage_type("q", q.scalar_type(), [&](auto storage) {
      using T = decltype(storage);
      launch(
          storage, attention_backward_columns_simple_kernel<T>, SIMPLE_COLUMNS<T>, SIMPLE_THREADS,
          simple_shared_elements<T>(static_cast<int>(call.dim()), 2, 4) * sizeof(Acc<T>));
    });
}

Tensor cached_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Rows& rows, const Columns& columns,
    const Scores& scores) {
  const auto [grad_q, delta] = cached_attention_backward_queries(grad_out, q, out, lse, keys, values, rows, scores);
  cached_attention_backward_columns(
      grad_out, q, lse, delta, keys, values, grad_keys, grad_values, rows, columns, scores);
  return grad_q;
}

}  // namespace diffmas
