#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace diffmas {

namespace {

constexpr int64_t COLUMNS_PER_TASK = 128;

/// The ragged segments of a concatenation; direction-free: forward reads `parts`, backward adds to them.
struct Plan {
  const int32_t *part_begin, *counts, *whole_begin;
  int64_t parts, layers, batch, heads, dim, pairs;
  const void *cos, *sin;
  bool interleaved;

  int64_t longest(int64_t part) const {
    const int32_t* of_part = counts + part * batch;
    return batch == 0 ? 0 : *std::max_element(of_part, of_part + batch);
  }
};

Plan make_plan(
    const std::vector<Tensor>& parts, const Tensor& whole, const Tensor& part_begin, const Tensor& counts,
    const Tensor& whole_begin, const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved) {
  const Plan plan{
      indices(part_begin),
      indices(counts),
      indices(whole_begin),
      static_cast<int64_t>(parts.size()),
      whole.size(0),
      whole.size(1),
      whole.size(2),
      whole.size(4),
      cos ? cos->size(2) : 0,
      cos ? cos->data_ptr() : nullptr,
      sin ? sin->data_ptr() : nullptr,
      interleaved};
  for (int64_t at = 0; at < plan.parts * plan.batch; ++at) {
    const int64_t part = at / plan.batch, row = at % plan.batch, count = plan.counts[at];
    const int64_t capacity = parts[part].size(3);
    STD_TORCH_CHECK(count >= 0, "counts[", part, ", ", row, "] is ", count, "; allowed: 0 and above");
    STD_TORCH_CHECK(
        count == 0 || (plan.part_begin[at] >= 0 && plan.part_begin[at] + count <= capacity), "source_begin[", part,
        ", ", row, "] is ", plan.part_begin[at], "; allowed: 0 to ", capacity - count, " for ", count, " columns");
    STD_TORCH_CHECK(
        count == 0 || (plan.whole_begin[at] >= 0 && plan.whole_begin[at] + count <= whole.size(3)), "dest_begin[", part,
        ", ", row, "] is ", plan.whole_begin[at], "; allowed: 0 to ", whole.size(3) - count, " for ", count,
        " columns");
  }
  return plan;
}

template <class T>
Trace<T> layer(const Tensor& tensor, int64_t index) {
  return {
      static_cast<T*>(tensor.data_ptr()) + index * tensor.stride(0), tensor.stride(1), tensor.stride(2),
      tensor.stride(3)};
}

/// Moves one part's columns into their place in `whole`, or (BACKWARD) adds those of `whole` to the part.
template <bool BACKWARD, class S, class T>
void move_part(const Plan& plan, int64_t part, const Tensor& source, const Tensor& target, bool rotated) {
  using A = Acc<S>;
  const auto kernel = DIFFMAS_KERNEL(move_columns<S, T>);
  const int64_t longest = plan.longest(part), blocks = (longest + COLUMNS_PER_TASK - 1) / COLUMNS_PER_TASK;
  const int64_t sequences = plan.layers * plan.batch * plan.heads;
  parallel_tasks(sequences * blocks, sequences * longest * plan.dim, [&](int64_t task) {
    const int64_t first = task % blocks * COLUMNS_PER_TASK, head = task / blocks % plan.heads;
    const int64_t row = task / blocks / plan.heads % plan.batch, index = task / blocks / plan.heads / plan.batch;
    const int64_t at = part * plan.batch + row, last = std::min<int64_t>(first + COLUMNS_PER_TASK, plan.counts[at]);
    if (first >= last) return;
    const int64_t part_column = plan.part_begin[at] + first, whole_column = plan.whole_begin[at] + first;
    const auto from = layer<const S>(source, index);
    const auto to = layer<T>(target, index);
    MoveColumns<S, T> move{};
    move.source = from.at(row, head, BACKWARD ? whole_column : part_column);
    move.source_stride = from.column_stride;
    move.target = to.at(row, head, BACKWARD ? part_column : whole_column);
    move.target_stride = to.column_stride;
    move.count = last - first;
    move.dim = plan.dim;
    move.pairs = rotated ? plan.pairs : 0;
    move.cos = static_cast<const A*>(plan.cos) + at * plan.pairs;
    move.sin = static_cast<const A*>(plan.sin) + at * plan.pairs;
    move.sign = BACKWARD ? -1 : 1;
    move.interleaved = plan.interleaved;
    move.add = BACKWARD;
    kernel(move, scratch<A>(2 * (plan.dim + PADDING)));
  });
}

void move_into(const Plan& plan, int64_t part, const Tensor& source, const Tensor& dest, bool rotated) {
  with_storage_type("source", source.scalar_type(), [&](auto from) {
    with_storage_type("keys", dest.scalar_type(), [&](auto to) {
      using S = decltype(from);
      using T = decltype(to);
      if constexpr (std::is_same_v<Acc<S>, Acc<T>>) move_part<false, S, T>(plan, part, source, dest, rotated);
    });
  });
}

}  // namespace

void kv_concat(
    const std::vector<Tensor>& source_keys, const std::vector<Tensor>& source_values, const Tensor& keys,
    const Tensor& values, const Tensor& source_begin, const Tensor& counts, const Tensor& dest_begin,
    const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved) {
  check_concat_plan(keys, values, source_keys.size(), source_values.size(), source_begin, counts, dest_begin, cos, sin);
  check_concat("source_keys", source_keys, "keys", keys);
  check_concat("source_values", source_values, "values", values);
  make_plan(source_values, values, source_begin, counts, dest_begin, cos, sin, interleaved);
  const Plan plan = make_plan(source_keys, keys, source_begin, counts, dest_begin, cos, sin, interleaved);
  for (int64_t i = 0; i < plan.parts; ++i) {
    move_into(plan, i, source_keys[i], keys, true);
    move_into(plan, i, source_values[i], values, false);
  }
}

void kv_concat_backward(
    const Tensor& grad_keys, const Tensor& grad_values, const std::vector<Tensor>& source_grad_keys,
    const std::vector<Tensor>& source_grad_values, const Tensor& source_begin, const Tensor& counts,
    const Tensor& dest_begin, const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved) {
  check_concat_plan(
      grad_keys, grad_values, source_grad_keys.size(), source_grad_values.size(), source_begin, counts, dest_begin, cos,
      sin);
  check_accumulators("grad_keys", grad_keys, "source_grad_keys", source_grad_keys);
  check_accumulators("grad_values", grad_values, "source_grad_values", source_grad_values);
  make_plan(source_grad_values, grad_values, source_begin, counts, dest_begin, cos, sin, interleaved);
  const Plan plan = make_plan(source_grad_keys, grad_keys, source_begin, counts, dest_begin, cos, sin, interleaved);
  for (int64_t i = 0; i < plan.parts; ++i) {
    const auto add = [&](auto accumulator) {
      using A = decltype(accumulator);
      move_part<true, A, A>(plan, i, grad_keys, source_grad_keys[i], true);
      move_part<true, A, A>(plan, i, grad_values, source_grad_values[i], false);
    };
    grad_keys.scalar_type() == ScalarType::Double ? add(double{}) : add(float{});
  }
}

}  // namespace diffmas
