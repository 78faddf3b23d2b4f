#include <cstring>

#include "cpu/few_rows.h"
#include "cpu/ranges.h"

namespace diffmas {

namespace {

/// Every token's turns in the accumulation type.
template <class A>
struct Turns {
  Rows<A> cos, sin;
};

template <class A>
Turns<A> read_turns(const Tensor& cos, const Tensor& sin) {
  std::unique_ptr<Turns<A>> turns;
  with_storage_type("cos", cos.scalar_type(), [&](auto storage) {
    using C = decltype(storage);
    if constexpr (std::is_same_v<Acc<C>, A>) turns.reset(new Turns<A>{read<C>(cos), read<C>(sin)});
  });
  return std::move(*turns);
}

/// Turns the `heads` heads of one token, `*_stride` elements apart.
template <class S>
void turn(
    Turns<Acc<S>>& turns, int64_t token, Acc<S> sign, bool interleaved, int64_t heads, int64_t dim, const S* source,
    int64_t source_stride, S* target, int64_t target_stride) {
  MoveColumns<S, S> move{};
  move.source = source;
  move.source_stride = source_stride;
  move.target = target;
  move.target_stride = target_stride;
  move.count = heads;
  move.dim = dim;
  move.pairs = turns.cos.size;
  move.cos = turns.cos.row(token);
  move.sin = turns.sin.row(token);
  move.sign = sign;
  move.interleaved = interleaved;
  DIFFMAS_KERNEL(move_columns<S, S>)(move, scratch<Acc<S>>(2 * (dim + PADDING)));
}

/// All tokens of `x`, turned.
template <class S>
Tensor turn_all(Turns<Acc<S>>& turns, const Tensor& x, Acc<S> sign, bool interleaved) {
  const Tensor out = new_tensor(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  const auto from = packed<const S>(x);
  const auto to = packed<S>(out);
  parallel_tasks(x.size(0), x.numel(), [&](int64_t token) {
    turn<S>(
        turns, token, sign, interleaved, x.size(1), x.size(2), from.at(token, 0), from.head_stride, to.at(token, 0),
        to.head_stride);
  });
  return out;
}

}  // namespace

Tensor rotary_append(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, bool interleaved,
    const Tensor& keys, const Tensor& values, const Tensor& q_begin, const Tensor& q_end, const Tensor& starts,
    int64_t max_new) {
  check_rotary_append(q, k, v, cos, sin, keys, values, q_begin, q_end, starts, max_new);
  const RowRanges rows = row_ranges(q_begin, q_end, starts);
  check_ranges(rows, keys.size(0), k.size(0), keys.size(2), max_new);
  Tensor out;
  with_storage_type("keys", keys.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    auto turns = read_turns<Acc<S>>(cos, sin);
    out = turn_all<S>(turns, q, 1, interleaved);
    const auto from_k = packed<const S>(k), from_v = packed<const S>(v);
    const auto to_k = trace<S>(keys), to_v = trace<S>(values);
    const int64_t heads = keys.size(1), dim = keys.size(3), row_work = max_new * heads * dim;
    parallel_tasks(keys.size(0) * max_new, keys.size(0) * row_work, [&](int64_t task) {
      const int64_t row = task / max_new, i = task % max_new;
      if (i >= rows.count(row)) return;
      const int64_t token = rows.token(row, i), column = rows.position(row, i);
      turn<S>(
          turns, token, 1, interleaved, heads, dim, from_k.at(token, 0), from_k.head_stride, to_k.at(row, 0, column),
          to_k.head_stride);
      for (int64_t head = 0; head < heads; ++head)
        std::memcpy(to_v.at(row, head, column), from_v.at(token, head), dim * sizeof(S));
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> rotary_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  check_rotary_backward(grad_q, grad_k, cos, sin);
  std::tuple<Tensor, Tensor> grads;
  with_storage_type("grad_q", grad_q.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    auto turns = read_turns<Acc<S>>(cos, sin);
    grads = {turn_all<S>(turns, grad_q, -1, interleaved), turn_all<S>(turns, grad_k, -1, interleaved)};
  });
  return grads;
}

}  // namespace diffmas
