// The operators' schemas, for every device, and the registration of the CPU implementations.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(diffmas, m) {
  m.def(
      "kv_append(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor q_begin, Tensor q_end, "
      "Tensor starts, int max_new) -> ()");
  m.def(
      "kv_gather(Tensor keys, Tensor values, Tensor q_begin, Tensor q_end, Tensor starts, int max_new, "
      "int total, ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "kv_concat(Tensor[] source_keys, Tensor[] source_values, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor source_begin, Tensor counts, Tensor dest_begin, Tensor? cos, Tensor? sin, "
      "bool interleaved) -> ()");
  m.def(
      "kv_concat_backward(Tensor grad_keys, Tensor grad_values, Tensor(a!)[] source_grad_keys, "
      "Tensor(b!)[] source_grad_values, Tensor source_begin, Tensor counts, Tensor dest_begin, "
      "Tensor? cos, Tensor? sin, bool interleaved) -> ()");
  m.def(
      "latent_project(Tensor hidden, Tensor? weight, float target_norm) -> (Tensor out, Tensor norm)");
  m.def(
      "latent_project_backward(Tensor grad_out, Tensor hidden, Tensor? weight, Tensor out, Tensor norm, "
      "float target_norm, bool need_weight) -> (Tensor, Tensor)");
  m.def(
      "cached_attention(Tensor q, Tensor? k, Tensor? v, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor q_begin, Tensor q_end, Tensor starts, int max_new, int max_kv, float scale) -> (Tensor out, "
      "Tensor lse)");
  m.def(
      "cached_attention_backward_queries(Tensor grad_out, Tensor q, Tensor out, Tensor lse, Tensor keys, "
      "Tensor values, Tensor q_begin, Tensor q_end, Tensor starts, int max_new, int max_kv, "
      "float scale) -> (Tensor grad_q, Tensor delta)");
  m.def(
      "cached_attention_backward_columns(Tensor grad_out, Tensor q, Tensor lse, Tensor delta, Tensor keys, "
      "Tensor values, Tensor(a!) grad_keys, Tensor(b!) grad_values, Tensor q_begin, Tensor q_end, "
      "Tensor starts, Tensor column_begin, Tensor column_end, int max_new, int max_kv, float scale) -> ()");
  m.def(
      "cached_attention_backward(Tensor grad_out, Tensor q, Tensor out, Tensor lse, Tensor keys, Tensor values, "
      "Tensor(a!) grad_keys, Tensor(b!) grad_values, Tensor q_begin, Tensor q_end, Tensor starts, "
      "Tensor column_begin, Tensor column_end, int max_new, int max_kv, float scale) -> Tensor");
  m.def(
      "cached_attention_backward_token(Tensor grad_out, Tensor q, Tensor out, Tensor lse, Tensor keys, "
      "Tensor values, Tensor grad_keys, Tensor grad_values, Tensor(a!) pending_q, Tensor(b!) pending_grad, "
      "Tensor(c!) pending_lse, Tensor(d!) pending_delta, int slot, Tensor q_begin, Tensor q_end, "
      "Tensor starts, int max_kv, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("few_rows_matmul(Tensor x, Tensor weight, bool transposed) -> Tensor");
  m.def(
      "merge_states(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(diffmas, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&diffmas::kv_append));
  m.impl("kv_gather", TORCH_BOX(&diffmas::kv_gather));
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
