#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/ranges.h"
#include "cpu/tiles.h"

namespace diffmas {

namespace {

template <class S>
AttentionInputs<S> inputs(
    const Tensor& q, const Tensor& keys, const Tensor& values, const RowRanges& rows, const Scores& scores) {
  return {
      packed<const S>(q),
      trace<const S>(keys),
      trace<const S>(values),
      rows,
      scores.mask(),
      q.size(1) / keys.size(1),
      q.size(2),
      static_cast<Acc<S>>(scores.softmax_scale),
      static_cast<Acc<S>>(scores.softcap.value_or(0))};
}

Tensor like(const Tensor& q) { return new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type()); }

Tensor per_head(const Tensor& q, ScalarType dtype) { return new_tensor(q, {q.size(0), q.size(1)}, dtype); }

template <class S>
void query_gradients(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const RowRanges& rows, const Scores& scores, const Tensor& grad_q, const Tensor& delta) {
  using A = Acc<S>;
  const int64_t dim = q.size(2), heads = keys.size(1);
  const QueryPlan plan = plan_queries(rows, scores.mask(), keys.size(0), heads, q.size(1) / heads);
  Buffer<A> partial(plan.partial_rows * dim);
  const QueryGradient<S> gradient{
      inputs<S>(q, keys, values, rows, scores),
      packed<const S>(grad_out),
      packed<const S>(out),
      packed<const A>(lse),
      packed<S>(grad_q),
      packed<A>(delta),
      partial.data()};
  const auto kernel = DIFFMAS_KERNEL(query_gradient<S>);
  parallel_tasks(plan.tiles.size(), plan.work * dim, [&](int64_t task) {
    kernel(gradient, plan.tiles[task], scratch<A>(attention_scratch(dim)));
  });
  const auto sum = DIFFMAS_KERNEL(sum_partials<S>);
  parallel_tasks(plan.splits.size(), plan.partial_rows * dim, [&](int64_t task) {
    sum(gradient, plan.splits[task], scratch<A>(attention_scratch(dim)));
  });
}

/// Writes a row's slot: its token's state.
template <class S>
void defer(const Tensor& source, const Tensor& pending, int64_t token, int64_t row, int64_t slot) {
  const int64_t heads = pending.size(2), dim = pending.dim() == 4 ? pending.size(3) : 1;
  const auto from = packed<const S>(source);
  S* target = static_cast<S*>(pending.data_ptr()) + row * pending.stride(0) + slot * pending.stride(1);
  for (int64_t head = 0; head < heads; ++head, target += pending.stride(2))
    std::copy_n(from.at(token, head), dim, target);
}

void check_columns(const int32_t* first, const int32_t* last, const Tensor& keys) {
  for (int64_t b = 0; b < keys.size(0); ++b)
    STD_TORCH_CHECK(
        first[b] >= last[b] || (first[b] >= 0 && last[b] <= keys.size(2)), "column_begin[", b, "], column_end[", b,
        "] are ", first[b], ", ", last[b], "; allowed: within 0 to ", keys.size(2));
}

template <class T>
Packed<const T> pending_of(const Tensor& pending, int64_t row, int64_t slot, int64_t head) {
  return {
      static_cast<const T*>(pending.data_ptr()) + row * pending.stride(0) + slot * pending.stride(1) +
          head * pending.stride(2),
      pending.stride(1), pending.stride(2)};
}

}  // namespace

std::tuple<Tensor, Tensor> cached_attention(
    const Tensor& q, const OptionalTensor& k, const OptionalTensor& v, const Tensor& keys, const Tensor& values,
    const Rows& given, const Scores& scores) {
  check_cached_attention(q, k, v, keys, values, given, scores);
  const RowRanges rows = given.ranges();
  check_ranges(rows, keys.size(0), q.size(0), given.max_seqlen_k, given.max_seqlen_q);
  if (k) kv_append(*k, *v, keys, values, given);
  const Tensor out = like(q), lse = per_head(q, accumulation_dtype("q", q.scalar_type()));
  zero_unclaimed(rows, keys.size(0), {&out, &lse});
  with_storage_type("q", q.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    const int64_t dim = q.size(2), heads = keys.size(1), group = q.size(1) / heads;
    const QueryPlan plan = plan_queries(rows, scores.mask(), keys.size(0), heads, group);
    Buffer<A> partial_out(plan.partial_rows * dim), partial_lse(plan.partial_rows);
    const Attend<S> attention{
        inputs<S>(q, keys, values, rows, scores), packed<S>(out), packed<A>(lse), partial_out.data(),
        partial_lse.data()};
    const auto kernel = DIFFMAS_KERNEL(attend<S>);
    parallel_tasks(plan.tiles.size(), plan.work * dim, [&](int64_t task) {
      kernel(attention, plan.tiles[task], scratch<A>(attention_scratch(dim)));
    });
    const auto merge = DIFFMAS_KERNEL(merge_row<A, S>);
    parallel_tasks(plan.splits.size(), plan.partial_rows * dim, [&](int64_t task) {
      const SplitTile& tile = plan.splits[task];
      const int64_t count = tile.last - tile.first;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t token = rows.token(tile.row, (tile.first + r) / group);
        const int64_t head = tile.head * group + (tile.first + r) % group;
        merge(
            {partial_out.data() + (tile.partial + r) * dim, count * dim, partial_lse.data() + tile.partial + r, count,
             tile.splits, dim, attention.out.at(token, head), attention.lse.at(token, head)},
            scratch<A>(attention_scratch(dim)));
      }
    });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> cached_attention_backward_queries(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Rows& given, const Scores& scores) {
  check_backward_queries(grad_out, q, out, lse, keys, values, given, scores);
  const RowRanges rows = given.ranges();
  check_ranges(rows, keys.size(0), q.size(0), given.max_seqlen_k, given.max_seqlen_q);
  const Tensor grad_q = like(q), delta = per_head(q, lse.scalar_type());
  zero_unclaimed(rows, keys.size(0), {&grad_q, &delta});
  with_storage_type("q", q.scalar_type(), [&](auto storage) {
    query_gradients<decltype(storage)>(grad_out, q, out, lse, keys, values, rows, scores, grad_q, delta);
  });
  return {grad_q, delta};
}

void cached_attention_backward_columns(
    const Tensor& grad_out, const Tensor& q, const Tensor& lse, const Tensor& delta, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Rows& given, const Columns& columns,
    const Scores& scores) {
  check_backward_columns(grad_out, q, lse, delta, keys, values, grad_keys, grad_values, given, columns, scores);
  const RowRanges rows = given.ranges();
  // Deferred rows have slots that a row never reached, which may lie behind the trace.
  check_token_ranges(rows, keys.size(0), q.size(0), given.max_seqlen_q);
  const int32_t *first = indices(columns.begin), *last = indices(columns.end);
  check_columns(first, last, keys);
  with_storage_type("q", q.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    const int64_t dim = q.size(2), heads = keys.size(1);
    const ColumnPlan plan = plan_columns(rows, scores.mask(), first, last, keys.size(0), heads, q.size(1) / heads);
    const ColumnGradient<S> gradient{
        inputs<S>(q, keys, values, rows, scores),
        packed<const S>(grad_out),
        packed<const A>(lse),
        packed<const A>(delta),
        trace<A>(grad_keys),
        trace<A>(grad_values)};
    const auto kernel = DIFFMAS_KERNEL(column_gradient<S>);
    parallel_tasks(plan.tiles.size(), plan.work * dim, [&](int64_t task) {
      kernel(gradient, plan.tiles[task], scratch<A>(attention_scratch(dim)));
    });
  });
}

Tensor cached_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Rows& given, const Columns& columns,
    const Scores& scores) {
  check_backward_queries(grad_out, q, out, lse, keys, values, given, scores);
  const Tensor delta = per_head(q, lse.scalar_type());
  check_backward_columns(grad_out, q, lse, delta, keys, values, grad_keys, grad_values, given, columns, scores);
  const RowRanges rows = given.ranges();
  check_ranges(rows, keys.size(0), q.size(0), given.max_seqlen_k, given.max_seqlen_q);
  const int32_t *first = indices(columns.begin), *last = indices(columns.end);
  check_columns(first, last, keys);
  const Tensor grad_q = like(q);
  zero_unclaimed(rows, keys.size(0), {&grad_q});
  with_storage_type("q", q.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    const int64_t dim = q.size(2), heads = keys.size(1), stride = (dim + PADDING - 1) / PADDING * PADDING;
    const GradientPlan plan = plan_gradients(rows, scores.mask(), keys.size(0), heads, q.size(1) / heads, stride);
    Buffer<A> partial(plan.partial_rows * stride);
    const AttentionGradient<S> gradient{
        {inputs<S>(q, keys, values, rows, scores), packed<const S>(grad_out), packed<const A>(lse),
         packed<const A>(delta), trace<A>(grad_keys), trace<A>(grad_values)},
        first,
        last,
        partial.data(),
        packed<S>(grad_q)};
    const Deltas<S> products{packed<const S>(out), packed<const S>(grad_out), packed<A>(delta), q.size(1), dim};
    const auto of_rows = DIFFMAS_KERNEL(deltas<S>);
    const auto kernel = DIFFMAS_KERNEL(attention_gradient<S>);
    const auto sum = DIFFMAS_KERNEL(sum_query_gradients<S>);
    const int64_t tokens = q.size(0), together = 16;
    parallel_tasks((tokens + together - 1) / together, 2 * q.numel(), [&](int64_t task) {
      const int64_t end = std::min(tokens, (task + 1) * together);
      of_rows(products, task * together, end, scratch<A>(attention_scratch(dim)));
    });
    parallel_tasks(plan.tiles.size(), plan.work * dim, [&](int64_t task) {
      kernel(gradient, plan.tiles[task], scratch<A>(attention_scratch(dim)));
    });
    parallel_tasks(plan.sums.size(), plan.partial_rows * dim, [&](int64_t task) {
      sum(gradient, plan.sums[task], scratch<A>(attention_scratch(dim)));
    });
  });
  return grad_q;
}

std::tuple<Tensor, Tensor, Tensor> cached_attention_backward_token(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Pending& pending, const Rows& given,
    const Scores& scores) {
  check_backward_token(grad_out, q, out, lse, keys, values, grad_keys, grad_values, pending, given, scores);
  const RowRanges rows = given.ranges();
  const int64_t batch = keys.size(0), heads = keys.size(1), dim = keys.size(3), group = q.size(1) / heads;
  check_ranges(rows, batch, q.size(0), given.max_seqlen_k, 1);
  const int32_t* origin = indices(pending.starts);
  const int64_t slots = pending.q.size(1);
  for (int64_t row = 0; row < batch; ++row)
    STD_TORCH_CHECK(
        rows.count(row) == 0 || (0 <= rows.starts[row] - origin[row] && rows.starts[row] - origin[row] < slots),
        "pending_starts[", row, "] is ", origin[row], "; allowed: ", rows.starts[row] - slots + 1, " to ",
        rows.starts[row], ", so that column ", rows.starts[row], " has one of the ", slots, " slots");
  const Tensor grad_q = like(q), delta = per_head(q, lse.scalar_type());
  const Tensor grad_k = new_tensor(q, {q.size(0), heads, dim}, q.scalar_type());
  const Tensor grad_v = new_tensor(q, {q.size(0), heads, dim}, q.scalar_type());
  zero_unclaimed(rows, batch, {&grad_q, &delta, &grad_k, &grad_v});
  with_storage_type("q", q.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    query_gradients<S>(grad_out, q, out, lse, keys, values, rows, scores, grad_q, delta);
    for (int64_t row = 0; row < batch; ++row) {
      if (rows.count(row) == 0) continue;
      const int64_t token = rows.begin[row], slot = rows.starts[row] - origin[row];
      defer<S>(q, pending.q, token, row, slot);
      defer<S>(grad_out, pending.grad, token, row, slot);
      defer<A>(lse, pending.lse, token, row, slot);
      defer<A>(delta, pending.delta, token, row, slot);
    }
    const auto kernel = DIFFMAS_KERNEL(own_column<S>);
    const auto key = trace<const S>(keys), value = trace<const S>(values);
    const auto grad_key = trace<const A>(grad_keys), grad_value = trace<const A>(grad_values);
    const auto target_k = packed<S>(grad_k), target_v = packed<S>(grad_v);
    parallel_tasks(batch * heads, batch * heads * slots * group * dim, [&](int64_t task) {
      const int64_t row = task / heads, head = task % heads, first = head * group;
      if (rows.count(row) == 0) return;
      const int64_t token = rows.begin[row], column = rows.starts[row], slot = column - origin[row];
      // A slot further on stands a column further on.
      const int64_t seeing = std::min(slots - slot, scores.mask().end_seeing(column) - column);
      const OwnColumn<S> own{
          pending_of<S>(pending.q, row, slot, first),
          pending_of<S>(pending.grad, row, slot, first),
          pending_of<A>(pending.lse, row, slot, first),
          pending_of<A>(pending.delta, row, slot, first),
          seeing,
          group,
          dim,
          static_cast<A>(scores.softmax_scale),
          static_cast<A>(scores.softcap.value_or(0)),
          key.at(row, head, column),
          value.at(row, head, column),
          grad_key.at(row, head, column),
          grad_value.at(row, head, column),
          target_k.at(token, head),
          target_v.at(token, head)};
      kernel(own, scratch<A>(attention_scratch(dim)));
    });
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace diffmas
