// Merging results over disjoint sets of columns: merge_states, and the slots of a split attention kernel. Sums run in a
// fixed order.
#pragma once

#include "diffmas/attention.cuh"

namespace diffmas {

/// Natural log of the sum of `count` exponentials; lse(s) is the logarithm of the s-th. All lanes of a warp together.
template <class A, class Lse>
__device__ __forceinline__ A merged_lse(int count, Lse lse) {
  const int lane = threadIdx.x % 32;
  A highest = -INFINITY, sum = 0;
  for (int s = lane; s < count; s += 32) highest = max(highest, lse(s));
  highest = warp_max(highest);
  if (highest == A(-INFINITY)) return highest;
  for (int s = lane; s < count; s += 32) sum += exp(lse(s) - highest);
  return highest + log(warp_sum(sum));
}

constexpr int MERGE_WARPS = 4, MERGE_THREADS = MERGE_WARPS * 32;

/// outs [sets, tokens, heads, dim] and lses [sets, tokens, heads]; a trace's row, head and column are here set, token
/// and head. A warp for each token and head. Grid: divide_up(tokens * heads, MERGE_WARPS).
template <class T>
__global__ void __launch_bounds__(MERGE_THREADS) merge_states_kernel(
    Trace<const T> outs, Trace<const Acc<T>> lses, T* out, Acc<T>* lse, int sets, int64_t tokens, int heads, int dim) {
  using A = Acc<T>;
  const int64_t row = int64_t(blockIdx.x) * MERGE_WARPS + threadIdx.x / 32, token = row / heads, head = row % heads;
  if (token >= tokens) return;
  const auto set_lse = [&](int s) { return *lses.at(s, token, head); };
  const A merged = merged_lse<A>(sets, set_lse);
  for (int d = threadIdx.x % 32; d < dim; d += 32) {
    A sum = 0;
#pragma unroll 4
    for (int s = 0; s < sets; ++s) {
      const A weight = set_lse(s) == A(-INFINITY) ? A(0) : A(exp(set_lse(s) - merged));
      // A set without weight may hold anything, NaN too.
      sum += weight > 0 ? weight * accurate(outs.at(s, token, head)[d]) : A(0);
    }
    out[row * dim + d] = rounded<T>(sum);
  }
  if (threadIdx.x % 32 == 0) lse[row] = merged;
}

/// Merges the slots of a split kernel into its output, weighted by their lse, or, where `lse` is null, by plain
/// addition. Rows whose columns fit one slot are final already. A block for each row, its warps share the slots. Grid:
/// (packed rows, kv heads, batch).
template <class T>
__global__ void __launch_bounds__(MERGE_THREADS)
    merge_slots_kernel(WorkPlan plan, Partials<Acc<T>> partials, Packed<T> out, Packed<Acc<T>> lse) {
  using A = Acc<T>;
  __shared__ A sums[MERGE_WARPS][LANE_ELEMENTS * 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y, dim = partials.dim;
  const QueryRows rows(plan, blockIdx.z, kv_head, blockIdx.x);
  if (!rows.valid(0)) return;
  const Chunk chunk = find_chunk(plan, -1, blockIdx.z);
  if (chunk.slots <= 1) return;
  const auto at = [&](int s) { return partials.index(chunk.first_slot + s, kv_head, rows.first); };
  const auto slot_lse = [&](int s) { return partials.lse[at(s)]; };
  const bool weighted = lse.data != nullptr;
  const A merged = weighted ? merged_lse<A>(chunk.slots, slot_lse) : A(0);
  A x[LANE_ELEMENTS] = {};
#pragma unroll 4
  for (int s = warp; s < chunk.slots; s += MERGE_WARPS) {
    const A weight = weighted ? A(exp(slot_lse(s) - merged)) : A(1);
#pragma unroll
    for (int e = 0; e < LANE_ELEMENTS; ++e)
      if (e * 32 + lane < dim) x[e] += weight * partials.out[at(s) * dim + e * 32 + lane];
  }
#pragma unroll
  for (int e = 0; e < LANE_ELEMENTS; ++e) sums[warp][e * 32 + lane] = x[e];
  __syncthreads();
  for (int d = threadIdx.x; d < dim; d += MERGE_THREADS) {
    A sum = 0;
#pragma unroll
    for (int w = 0; w < MERGE_WARPS; ++w) sum += sums[w][d];
    rows.at(out, 0)[d] = rounded<T>(sum);
  }
  if (weighted && threadIdx.x == 0) *rows.at(lse, 0) = merged;
}

}  // namespace diffmas
