#include <algorithm>
#include <cstring>

#include "checks.h"
#include "cpu/parallel.h"
#include "cpu/ranges.h"

namespace diffmas {

namespace {

constexpr int64_t TOKENS_PER_TASK = 64;

template <class T>
void append_head(
    const Packed<const T>& source, const Trace<T>& target, const RowRanges& rows, int64_t row, int64_t head,
    int64_t first, int64_t last, int64_t dim) {
  for (int64_t i = first; i < last; ++i)
    std::memcpy(
        target.at(row, head, rows.position(row, i)), source.at(rows.token(row, i), head), sizeof(T) * dim);
}

template <class T>
void append(
    const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const RowRanges& rows,
    int64_t max_new) {
  const int64_t heads = keys.size(1), dim = keys.size(3);
  const int64_t blocks = (max_new + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK;
  parallel_tasks(keys.size(0) * heads * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * TOKENS_PER_TASK, head = task / blocks % heads, row = task / blocks / heads;
    const int64_t last = std::min(first + TOKENS_PER_TASK, rows.count(row));
    append_head(packed<const T>(k), trace<T>(keys), rows, row, head, first, last, dim);
    append_head(packed<const T>(v), trace<T>(values), rows, row, head, first, last, dim);
  });
}

}  // namespace

void kv_append(
    const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const Tensor& q_begin,
    const Tensor& q_end, const Tensor& starts, int64_t max_new) {
  check_append(k, v, keys, values, q_begin, q_end, starts, max_new);
  const RowRanges rows = row_ranges(q_begin, q_end, starts);
  check_range_values(rows, keys.size(0), k.size(0), keys.size(2), max_new);
  switch (keys.element_size()) {
    case 2: return append<uint16_t>(k, v, keys, values, rows, max_new);
    case 4: return append<uint32_t>(k, v, keys, values, rows, max_new);
    default: return append<uint64_t>(k, v, keys, values, rows, max_new);
  }
}

}  // namespace diffmas
