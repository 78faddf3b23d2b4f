// Merging results over disjoint sets of columns: merge_states, and the slots of a split attention kernel. One warp a row, the
// sets in their order.
#pragma once

#include "diffmas/attention.cuh"

namespace diffmas {

/// Natural log of the sum of `count` exponentials; lse(s) is the logarithm of the s-th.
template <class A, class Lse>
__device__ __forceinline__ A merged_lse(int count, Lse lse) {
  A highest = -INFINITY, sum = 0;
  for (int s = 0; s < count; ++s) highest = max(highest, lse(s));
  if (highest == -INFINITY || highest == INFINITY) return highest;
  for (int s = 0; s < count; ++s) sum += exp(lse(s) - highest);
  return highest + log(sum);
}

/// out[d] = sum over s of weight(s) * element(s, d), where a weight of 0 hides whatever the element is.
template <class T, class A, class Weight, class Element>
__device__ __forceinline__ void merge_row(T* out, int count, int dim, Weight weight, Element element) {
  for (int d = threadIdx.x % 32; d < dim; d += 32) {
    A sum = 0;
#pragma unroll 4
    for (int s = 0; s < count; ++s) {
      const A w = weight(s);
      sum += w > 0 ? w * element(s, d) : A(0);
    }
    out[d] = rounded<T>(sum);
  }
}

constexpr int MERGE_WARPS = 4;

/// outs [sets, tokens, heads, dim] and lses [sets, tokens, heads]; a trace's row, head and column are here set, token and head.
/// Grid: divide_up(tokens * heads, MERGE_WARPS).
template <class T>
__global__ void merge_states_kernel(
    Trace<const T> outs, Trace<const Acc<T>> lses, T* out, Acc<T>* lse, int sets, int64_t tokens, int heads, int dim) {
  using A = Acc<T>;
  const int64_t row = int64_t(blockIdx.x) * MERGE_WARPS + threadIdx.x / 32, token = row / heads, head = row % heads;
  if (token >= tokens) return;
  const auto set_lse = [&](int s) { return *lses.at(s, token, head); };
  const A merged = merged_lse<A>(sets, set_lse);
  const auto weight = [&](int s) { return set_lse(s) == A(-INFINITY) ? A(0) : A(exp(set_lse(s) - merged)); };
  const auto element = [&](int s, int d) { return accurate(outs.at(s, token, head)[d]); };
  merge_row<T, A>(out + row * dim, sets, dim, weight, element);
  if (threadIdx.x % 32 == 0) lse[row] = merged;
}

/// Merges the slots of a split kernel into its output, weighted by their lse, or, where `lse` is null, by plain addition.
/// Rows whose columns fit one slot are final already. Grid: (divide_up(packed rows, MERGE_WARPS), kv heads, batch).
template <class T>
__global__ void merge_slots_kernel(
    WorkPlan plan, Partials<Acc<T>> partials, Packed<T> out, Packed<Acc<T>> lse) {
  using A = Acc<T>;
  const int packed_row = blockIdx.x * MERGE_WARPS + threadIdx.x / 32, kv_head = blockIdx.y, row = blockIdx.z;
  const QueryRows rows(plan, row, kv_head, packed_row);
  if (!rows.valid(0)) return;
  const Chunk chunk = find_chunk(plan, -1, row);
  if (chunk.slots <= 1) return;
  const auto at = [&](int s) { return partials.index(chunk.first_slot + s, kv_head, packed_row); };
  const auto element = [&](int s, int d) { return partials.out[at(s) * partials.dim + d]; };
  if (lse.data == nullptr) {
    merge_row<T, A>(rows.at(out, 0), chunk.slots, partials.dim, [](int) { return A(1); }, element);
    return;
  }
  const auto slot_lse = [&](int s) { return partials.lse[at(s)]; };
  const A merged = merged_lse<A>(chunk.slots, slot_lse);
  merge_row<T, A>(
      rows.at(out, 0), chunk.slots, partials.dim, [&](int s) { return A(exp(slot_lse(s) - merged)); }, element);
  if (threadIdx.x % 32 == 0) *rows.at(lse, 0) = merged;
}

}  // namespace diffmas
