#include "ops.h"

namespace diffmas {

Tensor cached_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Tensor& q_begin,
    const Tensor& q_end, const Tensor& starts, const Tensor& column_begin, const Tensor& column_end, int64_t max_new,
    int64_t max_kv, double scale) {
  const auto [grad_q, delta] = cached_attention_backward_queries(
      grad_out, q, out, lse, keys, values, q_begin, q_end, starts, max_new, max_kv, scale);
  cached_attention_backward_columns(
      grad_out, q, lse, delta, keys, values, grad_keys, grad_values, q_begin, q_end, starts, column_begin, column_end,
      max_new, max_kv, scale);
  return grad_q;
}

}  // namespace diffmas
