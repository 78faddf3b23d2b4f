#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace diffmas {

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses) {
  const ScalarType acc = check_merge(outs, lses);
  const int64_t splits = outs.size(0), tokens = outs.size(1), heads = outs.size(2), dim = outs.size(3);
  const Tensor out = new_tensor(outs, {tokens, heads, dim}, outs.scalar_type());
  const Tensor lse = new_tensor(outs, {tokens, heads}, acc);
  with_storage_type("outs", outs.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    const auto kernel = DIFFMAS_KERNEL(merge_row<S, S>);
    const auto targets = packed<S>(out);
    const auto target_lses = packed<A>(lse);
    parallel_tasks(tokens, splits * tokens * heads * dim, [&](int64_t token) {
      for (int64_t head = 0; head < heads; ++head) {
        const MergeRow<S, S> row{
            static_cast<const S*>(outs.data_ptr()) + token * outs.stride(1) + head * outs.stride(2),
            outs.stride(0),
            static_cast<const A*>(lses.data_ptr()) + token * lses.stride(1) + head * lses.stride(2),
            lses.stride(0),
            splits,
            dim,
            targets.at(token, head),
            target_lses.at(token, head)};
        kernel(row, scratch<A>(2 * (dim + PADDING)));
      }
    });
  });
  return {out, lse};
}

}  // namespace diffmas
