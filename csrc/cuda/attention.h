// What the attention launchers share: which kernel serves, how its work is cut, and the merge of what was cut.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "diffmas/merge.cuh"

namespace diffmas {

/// Arguments that every attention operator has, checked.
struct AttentionCall {
  const char* name;
  const Tensor &q, &keys, &values;
  const Rows& rows;
  const Scores& scores;

  int64_t batch() const { return keys.size(0); }
  int64_t kv_heads() const { return keys.size(1); }
  int64_t dim() const { return keys.size(3); }
  int64_t group() const { return q.size(1) / keys.size(1); }
  /// Most packed query rows of a (batch row, kv head).
  int64_t packed_rows() const { return rows.max_seqlen_q * group(); }
  bool empty() const { return batch() * q.numel() * packed_rows() == 0; }

  void check() const {
    STD_TORCH_CHECK(dim() <= 256, "keys has head dim ", dim(), "; allowed on CUDA: 1 to 256");
    STD_TORCH_CHECK(
        packed_rows() * group() < (int64_t(1) << 32), "max_seqlen_q is ", rows.max_seqlen_q,
        "; allowed on CUDA: below ", (int64_t(1) << 32) / (group() * group()), " with ", group(),
        " query heads per head of keys");
  }

  /// Whether the tensor-core kernels serve, which need `shared` bytes at head dim 256 (and 99 KB below).
  bool tensor_cores(const LaunchScope& scope, int64_t shared, std::initializer_list<const Tensor*> others) const {
    const int64_t d = dim();
    return (d == 64 || d == 96 || d == 128 || (d == 256 && shared <= scope.shared_limit())) &&
           suits_tensor_cores({&q, &keys, &values}) && common_alignment(others) == 16;
  }

  WorkPlan unsplit() const {
    return {rows.ranges(), static_cast<int>(batch()), 0, Divisor(static_cast<uint32_t>(group())), scores.mask()};
  }

  template <class T>
  AttentionInputs<T> inputs(const WorkPlan& plan) const {
    return {packed<const T>(q),      trace<const T>(keys),
            trace<const T>(values),  plan,
            static_cast<int>(dim()), static_cast<Acc<T>>(scores.softmax_scale),
            softcap<Acc<T>>()};
  }

  template <class A>
  SoftCap<A> softcap() const {
    return {static_cast<A>(scores.softcap.value_or(0))};
  }
};

/// A kernel's work over tiles of query rows, cut along the columns where tiles alone would not fill the device.
struct SplitWork {
  WorkPlan plan;
  dim3 grid;
  std::optional<Tensor> out, lse;  // memory of the partial results

  SplitWork(const LaunchScope& scope, const AttentionCall& call, int tile_rows, bool with_lse) : plan(call.unsplit()) {
    // One wave of blocks of equal work; more would fit at some head dims.
    constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 2;
    const int64_t tiles = divide_up(call.packed_rows(), tile_rows) * call.kv_heads(), batch = call.batch();
    const int64_t wanted = scope.multiprocessors() * BLOCKS_PER_MULTIPROCESSOR;
    const int64_t columns = call.scores.mask().reach(call.rows.max_seqlen_q, call.rows.max_seqlen_k);
    const int64_t most = batch * divide_up(columns, MIN_CHUNK_COLUMNS);
    if (tiles * batch < wanted && most >= 2 * batch) {
      // find_chunk sets one slot a row aside.
      const int64_t slots = std::min(batch + divide_up(wanted, tiles), most);
      const ScalarType acc = accumulation_dtype("q", call.q.scalar_type());
      plan.slots = static_cast<int>(slots);
      out = new_tensor(call.q, {slots, call.kv_heads(), call.packed_rows(), call.dim()}, acc);
      if (with_lse) lse = new_tensor(call.q, {slots, call.kv_heads(), call.packed_rows()}, acc);
    }
    grid = dim3(divide_up(call.packed_rows(), tile_rows), call.kv_heads(), plan.slots > 0 ? plan.slots : batch);
  }

  template <class A>
  Partials<A> partials(const AttentionCall& call) const {
    if (!out) return {};
    return {
        static_cast<A*>(out->data_ptr()), lse ? static_cast<A*>(lse->data_ptr()) : nullptr,
        static_cast<int>(call.kv_heads()), static_cast<int>(call.packed_rows()), static_cast<int>(call.dim())};
  }

  template <class T>
  void merge(
      const LaunchScope& scope, const AttentionCall& call, const Packed<T>& result,
      const Packed<Acc<T>>& result_lse) const {
    if (!out) return;
    const dim3 merge_grid(call.packed_rows(), call.kv_heads(), call.batch());
    scope.launch(
        call.name, merge_slots_kernel<T>, merge_grid, MERGE_THREADS, 0, plan, partials<Acc<T>>(call), result,
        result_lse);
  }
};

template <int D>
using HeadDim = std::integral_constant<int, D>;

/// f(HeadDim<D>()) for one of the head dims the tensor-core kernels are made for.
template <class F>
void with_head_dim(int64_t dim, F f) {
  switch (dim) {
    case 64:
      return f(HeadDim<64>());
    case 96:
      return f(HeadDim<96>());
    case 128:
      return f(HeadDim<128>());
    default:
      return f(HeadDim<256>());
  }
}

/// f(T{}) for 16-bit `dtype`.
template <class F>
void with_half_type(ScalarType dtype, F f) {
  dtype == ScalarType::Half ? f(Half{}) : f(BFloat16{});
}

/// Query rows that share one read of K and V, of the tensor-core kernels for few and for many of them.
constexpr int FEW_ROWS = 16, MANY_ROWS = 64;

}  // namespace diffmas
