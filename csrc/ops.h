// The operators, declared once; each library implements them for its device. Schemas and meaning: bindings.cpp.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "rows.h"

namespace diffmas {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

void kv_append(const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const Rows& rows);

std::tuple<Tensor, Tensor> kv_gather(
    const Tensor& keys, const Tensor& values, const Rows& rows, int64_t total, ScalarType dtype);

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
    const Rows& rows, const Scores& scores);

std::tuple<Tensor, Tensor> cached_attention_backward_queries(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Rows& rows, const Scores& scores);

void cached_attention_backward_columns(
    const Tensor& grad_out, const Tensor& q, const Tensor& lse, const Tensor& delta, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Rows& rows, const Columns& columns,
    const Scores& scores);

/// Both of the above.
Tensor cached_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Rows& rows, const Columns& columns,
    const Scores& scores);

std::tuple<Tensor, Tensor, Tensor> cached_attention_backward_token(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Pending& pending, const Rows& rows,
    const Scores& scores);

std::tuple<Tensor, Tensor> expected_embedding(
    const Tensor& hidden, const Tensor& keys, const Tensor& values, const OptionalTensor& bias,
    const Tensor& temperature, double scale, std::optional<double> softcap);

std::tuple<Tensor, Tensor> expected_embedding_backward(
    const Tensor& grad_out, const Tensor& hidden, const Tensor& keys, const Tensor& values, const OptionalTensor& bias,
    const Tensor& temperature, const Tensor& out, const Tensor& lse, double scale, std::optional<double> softcap);

Tensor few_rows_matmul(const Tensor& x, const Tensor& weight, bool transposed);

std::tuple<Tensor, Tensor> merge_states(const Tensor& outs, const Tensor& lses);

}  // namespace diffmas
