// What only the CPU can check without a synchronisation: the contents of the index tensors.
#pragma once

#include "checks.h"

namespace diffmas {

/// Every range lies in the `tokens` packed tokens and the first `columns` columns, and is no longer than max_new.
inline void check_range_values(const RowRanges& rows, int64_t batch, int64_t tokens, int64_t columns, int64_t max_new) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = rows.begin[b], end = rows.end[b], start = rows.starts[b];
    STD_TORCH_CHECK(
        0 <= begin && begin <= end && end <= tokens, "q_begin[", b, "], q_end[", b, "] are ", begin, ", ", end,
        "; allowed: 0 <= q_begin <= q_end <= ", tokens);
    STD_TORCH_CHECK(
        end - begin <= max_new, "max_new is ", max_new, "; allowed: at least the ", end - begin, " tokens of row ", b);
    STD_TORCH_CHECK(
        begin == end || (start >= 0 && start + end - begin <= columns), "starts[", b, "] is ", start,
        "; allowed: 0 to ", columns - (end - begin), ", so that ", end - begin, " tokens fit below column ", columns);
  }
}

}  // namespace diffmas
