// What a query sees of its row, for the kernels of CPU and CUDA; Python's is in scores.py, Triton's in
// triton_scores.py.
#pragma once

#include "diffmas/offsets.h"

namespace diffmas {

/// A query at `position` sees its own column and those before it: of them all the last `window`, and none before the
/// chunk of `chunk` columns that it stands in. What it sees has no gaps, and both ends move on with the position.
struct Mask {
  static constexpr int64_t WHOLE = INT32_MAX;
  int64_t window = WHOLE, chunk = WHOLE;

  DIFFMAS_HD bool local() const { return window < WHOLE || chunk < WHOLE; }

  /// The columns it sees are first_seen … end_seen - 1.
  DIFFMAS_HD int64_t first_seen(int64_t position) const {
    const int64_t of_window = position < window ? 0 : position + 1 - window, of_chunk = chunk_of(position) * chunk;
    return of_window > of_chunk ? of_window : of_chunk;
  }
  DIFFMAS_HD int64_t end_seen(int64_t position) const { return position + 1; }

  /// The queries that see `column` stand at first_seeing … end_seeing - 1; at most WHOLE.
  DIFFMAS_HD int64_t first_seeing(int64_t column) const { return column; }
  DIFFMAS_HD int64_t end_seeing(int64_t column) const {
    const int64_t of_window = column + window, of_chunk = (chunk_of(column) + 1) * chunk;
    const int64_t end = of_window < of_chunk ? of_window : of_chunk;
    return end < WHOLE ? end : WHOLE;
  }

  /// At most so many of `columns` columns are seen by `count` queries that stand side by side.
  DIFFMAS_HD int64_t reach(int64_t count, int64_t columns) const {
    const int64_t seen = (window < chunk ? window : chunk) - 1 + count;
    return seen < columns ? seen : columns;
  }

 private:
  /// Without a division where there are no chunks: a GPU's takes long.
  DIFFMAS_HD int64_t chunk_of(int64_t column) const { return chunk == WHOLE ? 0 : column / chunk; }
};

}  // namespace diffmas
