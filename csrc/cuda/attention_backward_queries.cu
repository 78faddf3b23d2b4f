// cached_attention_backward_queries, and with it cached_attention_backward_token: dQ and the own column in one launch.
#include "diffmas/attention_backward_queries.cuh"
#include "diffmas/attention_simple.cuh"

#include "cuda/attention.h"

namespace diffmas {

namespace {

struct QueryGradient {
  const AttentionCall& call;
  const Tensor &grad_out, &out, &lse, &grad_q;
  OptionalTensor delta;

  /// `own(T{})` gives the own-column arguments of element type T.
  template <class Own>
  void run(Own own) const {
    const LaunchScope scope(call.q);
    const auto launch = [&](auto storage, auto kernel, int tile_rows, int threads, size_t shared) {
      using T = decltype(storage);
      using A = Acc<T>;
      SplitWork work(scope, call, tile_rows, false);
      QueriesArguments<T> a{call.inputs<T>(work.plan)};
      a.grad_out = packed<const T>(grad_out);
      a.out = packed<const T>(out);
      a.lse = packed<const A>(lse);
      a.grad_q = packed<T>(grad_q);
      if (delta) a.delta = packed<A>(*delta);
      a.partials = work.partials<A>(call);
      a.own = own(storage);
      work.grid.z += a.own.blocks;
      scope.launch(call.name, kernel, work.grid, threads, shared, a);
      work.merge(scope, call, a.grad_q, Packed<A>{});
    };
    if (call.tensor_cores(scope, sizeof(QueriesShared<Half, 256, 1>), {&grad_out, &out, &grad_q}))
      with_half_type(call.q.scalar_type(), [&](auto storage) {
        using T = decltype(storage);
        with_head_dim(call.dim(), [&](auto dim) {
          constexpr int D = decltype(dim)::value;
          if (call.packed_rows() <= FEW_ROWS)
            launch(storage, attention_backward_queries_kernel<T, D, 1>, FEW_ROWS, 128, sizeof(QueriesShared<T, D, 1>));
          else
            launch(storage, attention_backward_queries_kernel<T, D, 4>, MANY_ROWS, 128, sizeof(QueriesShared<T, D, 4>));
        });
      });
    else
      with_storage_type("q", call.q.scalar_type(), [&](auto storage) {
        using T = decltype(storage);
        launch(
            storage, attention_backward_queries_simple_kernel<T>, SIMPLE_ROWS, SIMPLE_THREADS,
            simple_shared_elements<T>(static_cast<int>(call.dim()), 3, 2) * sizeof(Acc<T>));
      });
  }
};

}  // namespace

std::tuple<Tensor, Tensor> cached_attention_backward_queries(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Rows& rows, const Scores& scores) {
  check_backward_queries(grad_out, q, out, lse, keys, values, rows, scores);
  const AttentionCall call{"cached_attention_backward_queries", q, keys, values, rows, scores};
  call.check();
  const Tensor grad_q = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  const Tensor delta = new_tensor(q, {q.size(0), q.size(1)}, lse.scalar_type());
  if (call.empty()) return {grad_q, delta};
  QueryGradient{call, grad_out, out, lse, grad_q, delta}.run(
      [](auto storage) { return OwnColumnArguments<decltype(storage)>{}; });
  return {grad_q, delta};
}

std::tuple<Tensor, Tensor, Tensor> cached_attention_backward_token(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Pending& pending, const Rows& rows,
    const Scores& scores) {
  check_backward_token(grad_out, q, out, lse, keys, values, grad_keys, grad_values, pending, rows, scores);
  const AttentionCall call{"cached_attention_backward_token", q, keys, values, rows, scores};
  call.check();
  const Tensor grad_q = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  const Tensor grad_k = new_tensor(q, {q.size(0), keys.size(1), q.size(2)}, q.scalar_type());
  const Tensor grad_v = new_tensor(q, {q.size(0), keys.size(1), q.size(2)}, q.scalar_type());
  if (pending.q.numel() == 0) return {grad_q, grad_k, grad_v};
  QueryGradient{call, grad_out, out, lse, grad_q, std::nullopt}.run([&](auto storage) {
    using T = decltype(storage);
    using A = Acc<T>;
    OwnColumnArguments<T> own{};
    own.q = packed<const T>(q);
    own.grad_out = packed<const T>(grad_out);
    own.out = packed<const T>(out);
    own.lse = packed<const A>(lse);
    own.keys = trace<const T>(keys);
    own.values = trace<const T>(values);
    own.grad_keys = trace<const A>(grad_keys);
    own.grad_values = trace<const A>(grad_values);
    own.pending_q = trace<T>(pending.q);
    own.pending_grad = trace<T>(pending.grad);
    own.pending_lse = trace<A>(pending.lse);
    own.pending_delta = trace<A>(pending.delta);
    own.grad_k = packed<T>(grad_k);
    own.grad_v = packed<T>(grad_v);
    own.rows = rows.ranges();
    own.pending_starts = indices(pending.starts);
    own.slots = static_cast<int>(pending.q.size(1));
    own.group = static_cast<int>(call.group());
    own.dim = static_cast<int>(call.dim());
    own.blocks = static_cast<int>(call.batch());
    own.scale = static_cast<A>(scores.softmax_scale);
    own.softcap = call.softcap<A>();
    own.mask = scores.mask();
    return own;
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace diffmas
