// What only the CPU can check and use without a synchronisation: the contents of the index tensors.
#pragma once

#include <cstring>
#include <vector>

#include "arguments.h"

namespace diffmas {

/// Every range lies in the `tokens` packed tokens and is no longer than max_seqlen_q.
inline void check_token_ranges(const RowRanges& rows, int64_t batch, int64_t tokens, int64_t max_seqlen_q) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = rows.begin[b], end = rows.end[b];
    STD_TORCH_CHECK(
        0 <= begin && begin <= end && end <= tokens, "q_begin[", b, "], q_end[", b, "] are ", begin, ", ", end,
        "; allowed: 0 <= q_begin <= q_end <= ", tokens);
    STD_TORCH_CHECK(
        end - begin <= max_seqlen_q, "max_seqlen_q is ", max_seqlen_q, "; allowed: at least the ", end - begin,
        " tokens of row ", b);
    STD_TORCH_CHECK(
        begin == end || rows.starts[b] >= 0, "starts[", b, "] is ", rows.starts[b], "; allowed: 0 and above");
  }
}

/// The same, and every token's column is below `columns`.
inline void check_ranges(const RowRanges& rows, int64_t batch, int64_t tokens, int64_t columns, int64_t max_seqlen_q) {
  check_token_ranges(rows, batch, tokens, max_seqlen_q);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = rows.count(b);
    STD_TORCH_CHECK(
        count == 0 || rows.starts[b] + count <= columns, "starts[", b, "] is ", rows.starts[b], "; allowed: 0 to ",
        columns - count, ", so that the row's ", count, " tokens fit below column ", columns);
  }
}

/// Zeros the packed tokens of `tensors` (contiguous, the same number of tokens each) that no row claims.
inline void zero_unclaimed(const RowRanges& rows, int64_t batch, std::initializer_list<const Tensor*> tensors) {
  const int64_t tokens = (*tensors.begin())->size(0);
  std::vector<char> claimed(tokens, 0);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < rows.count(b); ++i) claimed[rows.token(b, i)] = 1;
  for (const Tensor* tensor : tensors) {
    const int64_t bytes = tokens == 0 ? 0 : tensor->numel() / tokens * static_cast<int64_t>(tensor->element_size());
    for (int64_t t = 0; t < tokens; ++t)
      if (!claimed[t]) std::memset(static_cast<char*>(tensor->data_ptr()) + t * bytes, 0, bytes);
  }
}

}  // namespace diffmas
