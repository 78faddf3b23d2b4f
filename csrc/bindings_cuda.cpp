// Registration of the CUDA implementations, one line per operator.
#include <torch/csrc/stable/library.h>

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

STABLE_TORCH_LIBRARY_IMPL(diffmas, CUDA, m) {
  m.impl("kv_append", TORCH_BOX(&diffmas::kv_append));
  m.impl("kv_gather", TORCH_BOX(&diffmas::kv_gather));
  m.impl("rotary_append", TORCH_BOX(&diffmas::rotary_append));
  m.impl("rotary_backward", TORCH_BOX(&diffmas::rotary_backward));
  m.impl("kv_concat", TORCH_BOX(&diffmas::kv_concat));
  m.impl("kv_concat_backward", TORCH_BOX(&diffmas::kv_concat_backward));
  m.impl("latent_project", TORCH_BOX(&diffmas::latent_project));
  m.impl("latent_project_backward", TORCH_BOX(&diffmas::latent_project_backward));
  m.impl("cached_attention", TORCH_BOX(&diffmas::cached_attention));
  m.impl("cached_attention_backward_queries", TORCH_BOX(&diffmas::cached_attention_backward_queries));
  m.impl("cached_attention_backward_columns", TORCH_BOX(&diffmas::cached_attention_backward_columns));
  m.impl("cached_attention_backward", TORCH_BOX(&diffmas::cached_attention_backward));
  m.impl("cached_attention_backward_token", TORCH_BOX(&diffmas::cached_attention_backward_token));
  m.impl("merge_states", TORCH_BOX(&diffmas::merge_states));
}
