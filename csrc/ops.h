// The operators, declared once; each library implements them for its device. Schemas and meaning: bindings.cpp.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace diffmas {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void kv_append(
    const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const Tensor& q_begin,
    const Tensor& q_end, const Tensor& starts, int64_t max_new);

std::tuple<Tensor, Tensor> kv_gather(
    const Tensor& keys, const Tensor& values, const Tensor& q_begin, const Tensor& q_end, const Tensor& starts,
    int64_t max_new, int64_t total, ScalarType dtype);

void kv_concat(
    const std::vector<Tensor>& source_keys, const std::vector<Tensor>& source_values, const Tensor& keys,
    const Tensor& values, const Tensor& source_begin, const Tensor& counts, const Tensor& dest_begin,
    const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved);

void kv_concat_backward(
    const Tensor& grad_keys, const Tensor& grad_values, const std::vector<Tensor>& source_grad_keys,
    const std::vector<Tensor>& source_grad_values, const Tensor& source_begin, const Tensor& counts,
    const Tensor& dest_begin, const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved);

std::tuple<Tensor, Tensor> latent_project(const Tensor& hidden, const OptionalTensor& weight, double target_norm);

std::tuple<Tensor, Tensor> latent_project_backward(
    const Tensor& grad_out, const Tensor& hidden, const OptionalTensor& weight, const Tensor& out, const Tensor& norm,
    double target_norm, bool need_weight);

std::tuple<Tensor, Tensor> cached_attention(
    const Tensor& q, const OptionalTensor& k, const OptionalTensor& v, const Tensor& keys, const Tensor& values,
    const Tensor& q_begin, const Tensor& q_end, const Tensor& starts, int64_t max_new, int64_t max_kv, double scale);

std::tuple<Tensor, Tensor> cached_attention_backward_queries(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& q_begin, const Tensor& q_end, const Tensor& starts, int64_t max_new,
    int64_t max_kv, double scale);

void cached_attention_backward_columns(
    const Tensor& grad_out, const Tensor& q, const Tensor& lse, const Tensor& delta, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Tensor& q_begin,
    const Tensor& q_end, const Tensor& starts, const Tensor& column_begin, const Tensor& column_end, int64_t max_new,
    int64_t max_kv, double scale);

/// Both of the above.
Tensor cached_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Tensor& q_begin,
    const Tensor& q_end, const Tensor& starts, const Tensor& column_begin, const Tensor& column_end, int64_t max_new,
    int64_t max_kv, double scale);

std::tuple<Tensor, Tensor, Tensor> cached_attention_backward_token(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Tensor& pending_q,
    const Tensor& pending_grad, const Tensor& pending_lse, const Tensor& pending_delta, int64_t slot,
    const Tensor& q_begin, const Tensor& q_end, const Tensor& starts, int64_t max_kv, double scale);

Tensor few_rows_matmul(const Tensor& x, const Tensor& weight, bool transposed);

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses);

}  // namespace diffmas
