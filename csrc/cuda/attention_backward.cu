#include "ops.h"

namespace diffmas {

Tensor cached_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Rows& rows, const Columns& columns,
    const Scores& scores) {
  const auto [grad_q, delta] = cached_attention_backward_queries(
      grad_out, q, out, lse, keys, values, rows, scores);
  cached_attention_backward_columns(
      grad_out, q, lse, delta, keys, values, grad_keys, grad_values, rows, columns, scores);
  return grad_q;
}

}  // namespace diffmas
