// Which tokens, columns and deferred rows an operator works on, each as one argument; as diffmas_ops/rows.py.
#pragma once

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "diffmas/mask.h"

namespace diffmas {

using torch::stable::Tensor;

struct Rows {
  const Tensor &q_begin, &q_end, &starts;
  int64_t max_seqlen_q, max_seqlen_k;

  RowRanges ranges() const { return {of(q_begin), of(q_end), of(starts)}; }

  static const int32_t* of(const Tensor& index) { return static_cast<const int32_t*>(index.data_ptr()); }
};

struct Columns {
  const Tensor &begin, &end;
};

struct Pending {
  const Tensor &q, &grad, &lse, &delta, &starts;
};

/// How scores are made, and which of them count; as diffmas_ops/scores.py.
struct Scores {
  double softmax_scale;
  std::optional<int64_t> window = {};
  std::optional<double> softcap = {};
  std::optional<int64_t> chunk = {};

  Mask mask() const { return {columns(window), columns(chunk)}; }

 private:
  static int64_t columns(std::optional<int64_t> given) { return std::min(given.value_or(Mask::WHOLE), Mask::WHOLE); }
};

}  // namespace diffmas
