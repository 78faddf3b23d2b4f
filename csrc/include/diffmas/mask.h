// What a query sees of its row, for the kernels of CPU and CUDA; Python's is in mask.py, Triton's in triton_mask.py.
#pragma once

#include "diffmas/offsets.h"

namespace diffmas {

/// A query at `position` sees its own column and those before it, the last `window` of them all.
struct Mask {
  static constexpr int64_t WHOLE = INT32_MAX;
  int64_t window = WHOLE;

  DIFFMAS_HD bool sees(int64_t position, int64_t column) const {
    return column <= position && position - column < window;
  }

  /// The columns it sees are first_seen … end_seen - 1.
  DIFFMAS_HD int64_t first_seen(int64_t position) const { return position < window ? 0 : position + 1 - window; }
  DIFFMAS_HD int64_t end_seen(int64_t position) const { return position + 1; }

  /// The queries that see `column` stand at first_seeing … end_seeing - 1.
  DIFFMAS_HD int64_t first_seeing(int64_t column) const { return column; }
  DIFFMAS_HD int64_t end_seeing(int64_t column) const { return column + window; }
};

}  // namespace diffmas
