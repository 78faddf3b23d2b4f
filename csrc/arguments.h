// Every operator's argument checks, as far as they need no look at the index tensors' contents. Shared by the CPU and
// the CUDA launchers.
#pragma once

#include <cmath>

#include "checks.h"

namespace diffmas {

inline void check_rows(const Rows& rows, const Tensor& keys) {
  check_index("q_begin", rows.q_begin, keys.size(0), keys);
  check_index("q_end", rows.q_end, keys.size(0), keys);
  check_index("starts", rows.starts, keys.size(0), keys);
  STD_TORCH_CHECK(rows.max_seqlen_q >= 0, "max_seqlen_q is ", rows.max_seqlen_q, "; allowed: 0 and above");
  STD_TORCH_CHECK(
      rows.max_seqlen_k >= 0 && rows.max_seqlen_k <= keys.size(2), "max_seqlen_k is ", rows.max_seqlen_k,
      "; allowed: 0 to ", keys.size(2), ", the capacity of keys");
}

/// Everything kv_append can check without reading the index tensors.
inline void check_append(const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values, const Rows& rows) {
  const ScalarType dtype = keys.scalar_type();
  accumulation_dtype("keys", dtype);
  check_trace("keys", keys, "values", values, dtype);
  check_dim("k", k, 3);
  check_tensor("k", k, {ANY, keys.size(1), keys.size(3)}, dtype, keys);
  check_tensor("v", v, {k.size(0), keys.size(1), keys.size(3)}, dtype, keys);
  check_rows(rows, keys);
}

inline void check_gather(const Tensor& keys, const Tensor& values, const Rows& rows, int64_t total, ScalarType dtype) {
  check_trace("keys", keys, "values", values, keys.scalar_type());
  check_rows(rows, keys);
  STD_TORCH_CHECK(total >= 0, "total is ", total, "; allowed: 0 and above");
  STD_TORCH_CHECK(
      accumulation_dtype("dtype", dtype) == accumulation_dtype("keys", keys.scalar_type()), "dtype is ",
      torch::headeronly::toString(dtype), "; allowed: one with the accumulation dtype of keys (",
      torch::headeronly::toString(keys.scalar_type()), ")");
}

inline void check_softcap(std::optional<double> softcap) {
  STD_TORCH_CHECK(
      softcap.value_or(1) > 0 && std::isfinite(softcap.value_or(1)), "softcap is ", *softcap,
      "; allowed: above 0 and finite, or None");
}

/// What all attention operators share. Returns the accumulation dtype.
inline ScalarType check_attention(
    const Tensor& q, const Tensor& keys, const Tensor& values, const Rows& rows, const Scores& scores) {
  const ScalarType dtype = keys.scalar_type(), acc = accumulation_dtype("keys", dtype);
  check_trace("keys", keys, "values", values, dtype);
  check_dim("q", q, 3);
  check_tensor("q", q, {ANY, ANY, keys.size(3)}, dtype, keys);
  STD_TORCH_CHECK(
      keys.size(1) > 0 && q.size(1) % keys.size(1) == 0, "q has ", q.size(1), " heads; allowed: a multiple of the ",
      keys.size(1), " heads of keys");
  STD_TORCH_CHECK(q.size(2) > 0, "q has head dim 0; allowed: 1 and above");
  check_rows(rows, keys);
  STD_TORCH_CHECK(scores.window.value_or(1) >= 1, "window is ", *scores.window, "; allowed: 1 and above, or None");
  STD_TORCH_CHECK(scores.chunk.value_or(1) >= 1, "chunk is ", *scores.chunk, "; allowed: 1 and above, or None");
  check_softcap(scores.softcap);
  return acc;
}

inline void check_cached_attention(
    const Tensor& q, const OptionalTensor& k, const OptionalTensor& v, const Tensor& keys, const Tensor& values,
    const Rows& rows, const Scores& scores) {
  check_attention(q, keys, values, rows, scores);
  STD_TORCH_CHECK(
      k.has_value() == v.has_value(), k.has_value() ? "v" : "k", " is None, ", k.has_value() ? "k" : "v",
      " is not; allowed: both or neither");
  if (!k.has_value()) return;
  check_append(*k, *v, keys, values, rows);
  STD_TORCH_CHECK(k->size(0) == q.size(0), "k has ", k->size(0), " tokens; allowed: ", q.size(0), ", the tokens of q");
}

inline void check_backward_queries(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Rows& rows, const Scores& scores) {
  const ScalarType acc = check_attention(q, keys, values, rows, scores);
  check_tensor("grad_out", grad_out, {q.size(0), q.size(1), q.size(2)}, q.scalar_type(), keys);
  check_tensor("out", out, {q.size(0), q.size(1), q.size(2)}, q.scalar_type(), keys);
  check_tensor("lse", lse, {q.size(0), q.size(1)}, acc, keys);
}

inline void check_gradient_trace(const Tensor& grad_keys, const Tensor& grad_values, const Tensor& keys) {
  const ScalarType acc = accumulation_dtype("keys", keys.scalar_type());
  check_tensor("grad_keys", grad_keys, {keys.size(0), keys.size(1), keys.size(2), keys.size(3)}, acc, keys);
  check_tensor("grad_values", grad_values, {keys.size(0), keys.size(1), keys.size(2), keys.size(3)}, acc, keys);
}

inline void check_backward_columns(
    const Tensor& grad_out, const Tensor& q, const Tensor& lse, const Tensor& delta, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Rows& rows, const Columns& columns,
    const Scores& scores) {
  const ScalarType acc = check_attention(q, keys, values, rows, scores);
  check_tensor("grad_out", grad_out, {q.size(0), q.size(1), q.size(2)}, q.scalar_type(), keys);
  check_tensor("lse", lse, {q.size(0), q.size(1)}, acc, keys);
  check_tensor("delta", delta, {q.size(0), q.size(1)}, acc, keys);
  check_gradient_trace(grad_keys, grad_values, keys);
  check_index("column_begin", columns.begin, keys.size(0), keys);
  check_index("column_end", columns.end, keys.size(0), keys);
}

inline void check_backward_token(
    const Tensor& grad_out, const Tensor& q, const Tensor& out, const Tensor& lse, const Tensor& keys,
    const Tensor& values, const Tensor& grad_keys, const Tensor& grad_values, const Pending& pending, const Rows& rows,
    const Scores& scores) {
  check_backward_queries(grad_out, q, out, lse, keys, values, rows, scores);
  STD_TORCH_CHECK(rows.max_seqlen_q == 1, "max_seqlen_q is ", rows.max_seqlen_q, "; allowed: 1");
  check_gradient_trace(grad_keys, grad_values, keys);
  const ScalarType dtype = q.scalar_type(), acc = accumulation_dtype("q", dtype);
  const int64_t batch = keys.size(0), heads = q.size(1), dim = q.size(2);
  check_dim("pending_q", pending.q, 4);
  const int64_t slots = pending.q.size(1);
  check_tensor("pending_q", pending.q, {batch, ANY, heads, dim}, dtype, keys);
  check_tensor("pending_grad", pending.grad, {batch, slots, heads, dim}, dtype, keys);
  check_tensor("pending_lse", pending.lse, {batch, slots, heads}, acc, keys);
  check_tensor("pending_delta", pending.delta, {batch, slots, heads}, acc, keys);
  check_index("pending_starts", pending.starts, batch, keys);
}

/// Source and destination of a concatenation: dtypes may differ where the accumulation dtype does not.
inline void check_concat(
    const char* sources_name, const std::vector<Tensor>& sources, const char* name, const Tensor& dest) {
  const ScalarType acc = accumulation_dtype(name, dest.scalar_type());
  for (size_t i = 0; i < sources.size(); ++i) {
    const std::string label = std::string(sources_name) + "[" + std::to_string(i) + "]";
    const Tensor& source = sources[i];
    STD_TORCH_CHECK(
        accumulation_dtype(label.c_str(), source.scalar_type()) == acc, label, " is ",
        torch::headeronly::toString(source.scalar_type()), "; allowed: one with the accumulation dtype of ", name, " (",
        torch::headeronly::toString(dest.scalar_type()), ")");
    check_tensor(
        label.c_str(), source, {dest.size(0), dest.size(1), dest.size(2), ANY, dest.size(4)}, source.scalar_type(),
        dest);
  }
}

/// Gradients of a concatenation: all float32 or all float64.
inline void check_accumulators(
    const char* name, const Tensor& dest, const char* sources_name, const std::vector<Tensor>& sources) {
  const ScalarType dtype = dest.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double, name, " is ", torch::headeronly::toString(dtype),
      "; allowed: Float, Double");
  for (size_t i = 0; i < sources.size(); ++i)
    check_tensor(
        (std::string(sources_name) + "[" + std::to_string(i) + "]").c_str(), sources[i],
        {dest.size(0), dest.size(1), dest.size(2), ANY, dest.size(4)}, dtype, dest);
}

inline void check_concat_plan(
    const Tensor& keys, const Tensor& values, size_t key_sources, size_t value_sources, const Tensor& source_begin,
    const Tensor& counts, const Tensor& dest_begin, const OptionalTensor& cos, const OptionalTensor& sin) {
  const ScalarType dtype = keys.scalar_type(), acc = accumulation_dtype("keys", dtype);
  check_dim("keys", keys, 5);
  check_tensor("keys", keys, {ANY, ANY, ANY, ANY, ANY}, dtype, keys);
  check_tensor("values", values, {keys.size(0), keys.size(1), keys.size(2), keys.size(3), keys.size(4)}, dtype, keys);
  STD_TORCH_CHECK(
      key_sources == value_sources, "there are ", value_sources, " source values; allowed: ", key_sources,
      ", as many as source keys");
  const int64_t n = static_cast<int64_t>(key_sources), batch = keys.size(1);
  check_tensor("source_begin", source_begin, {n, batch}, ScalarType::Int, keys);
  check_tensor("counts", counts, {n, batch}, ScalarType::Int, keys);
  check_tensor("dest_begin", dest_begin, {n, batch}, ScalarType::Int, keys);
  check_contiguous("source_begin", source_begin);
  check_contiguous("counts", counts);
  check_contiguous("dest_begin", dest_begin);
  STD_TORCH_CHECK(
      cos.has_value() == sin.has_value(), cos.has_value() ? "sin" : "cos", " is None, ",
      cos.has_value() ? "cos" : "sin", " is not; allowed: both or neither");
  if (!cos.has_value()) return;
  check_tensor("cos", *cos, {n, batch, ANY}, acc, keys);
  check_tensor("sin", *sin, {n, batch, cos->size(2)}, acc, keys);
  check_contiguous("cos", *cos);
  check_contiguous("sin", *sin);
  STD_TORCH_CHECK(
      2 * cos->size(2) <= keys.size(4), "cos has ", cos->size(2), " pairs; allowed: at most ", keys.size(4) / 2,
      ", half the head dim");
}

/// Returns the accumulation dtype.
inline ScalarType check_expected(
    const Tensor& hidden, const Tensor& keys, const Tensor& values, const OptionalTensor& bias,
    const Tensor& temperature, std::optional<double> softcap) {
  const ScalarType dtype = hidden.scalar_type(), acc = accumulation_dtype("hidden", dtype);
  check_dim("hidden", hidden, 2);
  check_tensor("hidden", hidden, {ANY, ANY}, dtype, hidden);
  check_tensor("keys", keys, {ANY, hidden.size(1)}, dtype, hidden);
  STD_TORCH_CHECK(keys.size(0) > 0, "keys has no token; allowed: 1 and above");
  check_tensor("values", values, {keys.size(0), ANY}, dtype, hidden);
  if (bias.has_value()) check_tensor("bias", *bias, {keys.size(0)}, dtype, hidden);
  check_tensor("temperature", temperature, {1}, acc, hidden);
  check_softcap(softcap);
  return acc;
}

inline ScalarType check_expected_backward(
    const Tensor& grad_out, const Tensor& hidden, const Tensor& keys, const Tensor& values, const OptionalTensor& bias,
    const Tensor& temperature, const Tensor& out, const Tensor& lse, std::optional<double> softcap) {
  const ScalarType acc = check_expected(hidden, keys, values, bias, temperature, softcap);
  check_tensor("grad_out", grad_out, {hidden.size(0), values.size(1)}, hidden.scalar_type(), hidden);
  check_tensor("out", out, {hidden.size(0), values.size(1)}, hidden.scalar_type(), hidden);
  check_tensor("lse", lse, {hidden.size(0)}, acc, hidden);
  return acc;
}

/// Returns the accumulation dtype.
inline void check_few_rows(const Tensor& x, const Tensor& weight, bool transposed) {
  const ScalarType dtype = x.scalar_type();
  accumulation_dtype("x", dtype);
  check_dim("x", x, 2);
  check_tensor("x", x, {ANY, ANY}, dtype, x);
  check_dim("weight", weight, 2);
  const int64_t size = x.size(1);
  check_tensor("weight", weight, {transposed ? ANY : size, transposed ? size : ANY}, dtype, x);
}

inline ScalarType check_project(const Tensor& hidden, const OptionalTensor& weight) {
  const ScalarType dtype = hidden.scalar_type(), acc = accumulation_dtype("hidden", dtype);
  check_dim("hidden", hidden, 2);
  check_tensor("hidden", hidden, {ANY, ANY}, dtype, hidden);
  if (weight.has_value()) check_tensor("weight", *weight, {hidden.size(1), hidden.size(1)}, dtype, hidden);
  return acc;
}

inline ScalarType check_project_backward(
    const Tensor& grad_out, const Tensor& hidden, const OptionalTensor& weight, const Tensor& out, const Tensor& norm) {
  const ScalarType acc = check_project(hidden, weight);
  check_tensor("grad_out", grad_out, {hidden.size(0), hidden.size(1)}, hidden.scalar_type(), hidden);
  check_tensor("out", out, {hidden.size(0), hidden.size(1)}, hidden.scalar_type(), hidden);
  check_tensor("norm", norm, {hidden.size(0)}, acc, hidden);
  return acc;
}

/// Returns the accumulation dtype.
inline ScalarType check_merge(const Tensor& outs, const Tensor& lses) {
  const ScalarType dtype = outs.scalar_type(), acc = accumulation_dtype("outs", dtype);
  check_dim("outs", outs, 4);
  check_tensor("outs", outs, {ANY, ANY, ANY, ANY}, dtype, outs);
  check_tensor("lses", lses, {outs.size(0), outs.size(1), outs.size(2)}, acc, outs);
  return acc;
}

}  // namespace diffmas
