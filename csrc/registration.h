// The operators as the dispatcher calls them, with what is one argument inside laid flat, for CPU and CUDA alike.
#pragma once

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace diffmas::flat {

/// The parameters of a Rows and of a Scores, and what they make.
#define DIFFMAS_ROWS \
  const Tensor &q_begin, const Tensor &q_end, const Tensor &starts, int64_t max_seqlen_q, int64_t max_seqlen_k
#define DIFFMAS_SCORES \
  double softmax_scale, std::optional<int64_t> window, std::optional<double> softcap, std::optional<int64_t> chunk
#define DIFFMAS_THE_ROWS \
  Rows { q_begin, q_end, starts, max_seqlen_q, max_seqlen_k }
#define DIFFMAS_THE_SCORES \
  Scores { softmax_scale, window, softcap, chunk }

inline void kv_append(const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, DIFFMAS_ROWS) {
  diffmas::kv_append(k, v, keys, values, DIFFMAS_THE_ROWS);
}

inline std::tuple<Tensor, Tensor> kv_gather(
    const Tensor& keys, const Tensor& values, DIFFMAS_ROWS, int64_t total, ScalarType dtype) {
  return diffmas::kv_gather(keys, values, DIFFMAS_THE_ROWS, total, dtype);
}

inline std::tuple<Tensor, Tensor> cached_attention(
    const Tensor& q, const OptionalTensor& k, const OptionalTensor& v, const Tensor& keys, const Tensor& values,
    DIFFMAS_ROWS, DIFFMAS_SCORES) {
  return diffmas::cached_attention(q, k, v, keys, values, DIFFMAS_THE_ROWS, DIFFMAS_THE_SCORES);
}

inline std::tuple<Tensor, Tensor> cached_attention_backward_queries(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, DIFFMAS_ROWS, DIFFMAS_SCORES) {
  return diffmas::cached_attention_backward_queries(
      grad_out, q, out, lse, keys, values, DIFFMAS_THE_ROWS, DIFFMAS_THE_SCORES);
}

inline void cached_attention_backward_columns(
    const Tensor& grad_out, const Tensor& q, const Tensor& lse, const Tensor& delta, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, DIFFMAS_ROWS, const Tensor& column_begin,
    const Tensor& column_end, DIFFMAS_SCORES) {
  diffmas::cached_attention_backward_columns(
      grad_out, q, lse, delta, keys, values, grad_keys, grad_values, DIFFMAS_THE_ROWS, {column_begin, column_end},
      DIFFMAS_THE_SCORES);
}

inline Tensor cached_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, DIFFMAS_ROWS, const Tensor& column_begin,
    const Tensor& column_end, DIFFMAS_SCORES) {
  return diffmas::cached_attention_backward(
      grad_out, q, out, lse, keys, values, grad_keys, grad_values, DIFFMAS_THE_ROWS, {column_begin, column_end},
      DIFFMAS_THE_SCORES);
}

inline std::tuple<Tensor, Tensor, Tensor> cached_attention_backward_token(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Tensor& pending_q,
    const Tensor& pending_grad, const Tensor& pending_lse, const Tensor& pending_delta, const Tensor& pending_starts,
    DIFFMAS_ROWS, DIFFMAS_SCORES) {
  return diffmas::cached_attention_backward_token(
      grad_out, q, out, lse, keys, values, grad_keys, grad_values,
      {pending_q, pending_grad, pending_lse, pending_delta, pending_starts}, DIFFMAS_THE_ROWS, DIFFMAS_THE_SCORES);
}

/// What every device has.
template <class Library>
void register_operators(Library& m) {
  m.impl("kv_append", TORCH_BOX(&flat::kv_append));
  m.impl("kv_gather", TORCH_BOX(&flat::kv_gather));
  m.impl("kv_concat", TORCH_BOX(&diffmas::kv_concat));
  m.impl("kv_concat_backward", TORCH_BOX(&diffmas::kv_concat_backward));
  m.impl("latent_project", TORCH_BOX(&diffmas::latent_project));
  m.impl("latent_project_backward", TORCH_BOX(&diffmas::latent_project_backward));
  m.impl("cached_attention", TORCH_BOX(&flat::cached_attention));
  m.impl("cached_attention_backward_queries", TORCH_BOX(&flat::cached_attention_backward_queries));
  m.impl("cached_attention_backward_columns", TORCH_BOX(&flat::cached_attention_backward_columns));
  m.impl("cached_attention_backward", TORCH_BOX(&flat::cached_attention_backward));
  m.impl("cached_attention_backward_token", TORCH_BOX(&flat::cached_attention_backward_token));
  m.impl("expected_embedding", TORCH_BOX(&diffmas::expected_embedding));
  m.impl("expected_embedding_backward", TORCH_BOX(&diffmas::expected_embedding_backward));
  m.impl("merge_states", TORCH_BOX(&diffmas::merge_states));
}

}  // namespace diffmas::flat
