#include <algorithm>
#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/ranges.h"

namespace diffmas {

namespace {

constexpr int64_t TOKENS_PER_TASK = 64;

/// Calls move(row, head, first, last) for blocks [first, last) of every row's tokens, in parallel.
template <class Move>
void for_token_blocks(
    const RowRanges& rows, int64_t batch, int64_t heads, int64_t dim, int64_t max_seqlen_q, const Move& move) {
  const int64_t blocks = (max_seqlen_q + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK;
  parallel_tasks(batch * heads * blocks, batch * heads * max_seqlen_q * dim, [&](int64_t task) {
    const int64_t first = task % blocks * TOKENS_PER_TASK, head = task / blocks % heads, row = task / blocks / heads;
    const int64_t last = std::min(first + TOKENS_PER_TASK, rows.count(row));
    if (first < last) move(row, head, first, last);
  });
}

template <class T>
void append(
    const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const RowRanges& rows,
    int64_t max_seqlen_q) {
  const int64_t bytes = keys.size(3) * static_cast<int64_t>(sizeof(T));
  const auto copy = [&](const Packed<const T>& source, const Trace<T>& target, int64_t row, int64_t head, int64_t i) {
    std::memcpy(target.at(row, head, rows.position(row, i)), source.at(rows.token(row, i), head), bytes);
  };
  const auto source_k = packed<const T>(k), source_v = packed<const T>(v);
  const auto target_k = trace<T>(keys), target_v = trace<T>(values);
  for_token_blocks(
      rows, keys.size(0), keys.size(1), keys.size(3), max_seqlen_q,
      [&](int64_t row, int64_t head, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          copy(source_k, target_k, row, head, i);
          copy(source_v, target_v, row, head, i);
        }
      });
}

template <class S, class T>
void gather(const Tensor& source, const Tensor& packed_out, const RowRanges& rows, int64_t max_seqlen_q) {
  const auto kernel = DIFFMAS_KERNEL(move_columns<S, T>);
  const int64_t dim = source.size(3);
  const auto from = trace<const S>(source);
  const auto to = packed<T>(packed_out);
  for_token_blocks(
      rows, source.size(0), source.size(1), dim, max_seqlen_q,
      [&](int64_t row, int64_t head, int64_t first, int64_t last) {
        MoveColumns<S, T> move{};
        move.source = from.at(row, head, rows.position(row, first));
        move.source_stride = from.column_stride;
        move.target = to.at(rows.token(row, first), head);
        move.target_stride = to.token_stride;
        move.count = last - first;
        move.dim = dim;
        kernel(move, scratch<Acc<S>>(2 * (dim + PADDING)));
      });
}

}  // namespace

void kv_append(const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const Rows& given) {
  check_append(k, v, keys, values, given);
  const RowRanges rows = given.ranges();
  const int64_t max_seqlen_q = given.max_seqlen_q;
  check_ranges(rows, keys.size(0), k.size(0), keys.size(2), max_seqlen_q);
  switch (keys.element_size()) {
    case 2:
      return append<uint16_t>(k, v, keys, values, rows, max_seqlen_q);
    case 4:
      return append<uint32_t>(k, v, keys, values, rows, max_seqlen_q);
    default:
      return append<uint64_t>(k, v, keys, values, rows, max_seqlen_q);
  }
}

std::tuple<Tensor, Tensor> kv_gather(
    const Tensor& keys, const Tensor& values, const Rows& given, int64_t total, ScalarType dtype) {
  check_gather(keys, values, given, total, dtype);
  const RowRanges rows = given.ranges();
  const int64_t max_seqlen_q = given.max_seqlen_q;
  check_ranges(rows, keys.size(0), total, keys.size(2), max_seqlen_q);
  const Tensor k = new_tensor(keys, {total, keys.size(1), keys.size(3)}, dtype);
  const Tensor v = new_tensor(keys, {total, keys.size(1), keys.size(3)}, dtype);
  zero_unclaimed(rows, keys.size(0), {&k, &v});
  with_storage_type("keys", keys.scalar_type(), [&](auto source) {
    with_storage_type("dtype", dtype, [&](auto target) {
      using S = decltype(source);
      using T = decltype(target);
      if constexpr (std::is_same_v<Acc<S>, Acc<T>>) {
        gather<S, T>(keys, k, rows, max_seqlen_q);
        gather<S, T>(values, v, rows, max_seqlen_q);
      }
    });
  });
  return {k, v};
}

}  // namespace diffmas
