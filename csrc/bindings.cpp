// The operators' schemas, for every device, and the registration of the CPU implementations.
#include "registration.h"

#define ROWS "Tensor q_begin, Tensor q_end, Tensor starts, int max_seqlen_q, int max_seqlen_k, "
#define SCORES "float softmax_scale, int? window=None, float? softcap=None, int? chunk=None"

STABLE_TORCH_LIBRARY(diffmas, m) {
  m.def(
      "kv_append(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor q_begin, Tensor q_end, "
      "Tensor starts, int max_seqlen_q, int max_seqlen_k) -> ()");
  m.def("kv_gather(Tensor keys, Tensor values, " ROWS "int total, ScalarType dtype) -> (Tensor, Tensor)");
  m.def(
      "kv_concat(Tensor[] source_keys, Tensor[] source_values, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor source_begin, Tensor counts, Tensor dest_begin, Tensor? cos, Tensor? sin, "
      "bool interleaved) -> ()");
  m.def(
      "kv_concat_backward(Tensor grad_keys, Tensor grad_values, Tensor(a!)[] source_grad_keys, "
      "Tensor(b!)[] source_grad_values, Tensor source_begin, Tensor counts, Tensor dest_begin, "
      "Tensor? cos, Tensor? sin, bool interleaved) -> ()");
  m.def("latent_project(Tensor hidden, Tensor? weight, float target_norm) -> (Tensor out, Tensor norm)");
  m.def(
      "latent_project_backward(Tensor grad_out, Tensor hidden, Tensor? weight, Tensor out, Tensor norm, "
      "float target_norm, bool need_weight) -> (Tensor, Tensor)");
  m.def(
      "cached_attention(Tensor q, Tensor? k, Tensor? v, Tensor(a!) keys, Tensor(b!) values, " ROWS SCORES
      ") -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "cached_attention_backward_queries(Tensor grad_out, Tensor q, Tensor out, Tensor lse, Tensor keys, "
      "Tensor values, " ROWS SCORES ") -> (Tensor grad_q, Tensor delta)");
  m.def(
      "cached_attention_backward_columns(Tensor grad_out, Tensor q, Tensor lse, Tensor delta, Tensor keys, "
      "Tensor values, Tensor(a!) grad_keys, Tensor(b!) grad_values, " ROWS
      "Tensor column_begin, Tensor column_end, " SCORES ") -> ()");
  m.def(
      "cached_attention_backward(Tensor grad_out, Tensor q, Tensor out, Tensor lse, Tensor keys, Tensor values, "
      "Tensor(a!) grad_keys, Tensor(b!) grad_values, " ROWS "Tensor column_begin, Tensor column_end, " SCORES
      ") -> Tensor");
  m.def(
      "cached_attention_backward_token(Tensor grad_out, Tensor q, Tensor out, Tensor lse, Tensor keys, "
      "Tensor values, Tensor grad_keys, Tensor grad_values, Tensor(a!) pending_q, Tensor(b!) pending_grad, "
      "Tensor(c!) pending_lse, Tensor(d!) pending_delta, Tensor pending_starts, " ROWS SCORES
      ") -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "expected_embedding(Tensor hidden, Tensor keys, Tensor values, Tensor? bias, Tensor temperature, float scale, "
      "float? softcap) -> (Tensor out, Tensor lse)");
  m.def(
      "expected_embedding_backward(Tensor grad_out, Tensor hidden, Tensor keys, Tensor values, Tensor? bias, "
      "Tensor temperature, Tensor out, Tensor lse, float scale, float? softcap) -> (Tensor, Tensor)");
  m.def("few_rows_matmul(Tensor x, Tensor weight, bool transposed) -> Tensor");
  m.def("merge_states(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(diffmas, CPU, m) { diffmas::flat::register_operators(m); }
