// cached_attention_backward_queries for 16-bit data: dQ with one read of K and V, on the tiles of the forward.
#pragma once

#include "diffmas/attention_forward.cuh"
#include "diffmas/own_column.cuh"

namespace diffmas {

template <class T, int D, int ROW_WARPS>
struct QueriesShared {
  using Tiles = AttentionTiles<D, ROW_WARPS>;
  union alignas(128) {
    T columns[Tiles::STAGES][2][Tiles::COLUMNS * Tiles::STRIDE];
    float result[Tiles::COLUMN_WARPS][Tiles::ROWS][Tiles::RESULT_STRIDE];
    float own_column[2 * 4 * D];
  };
  alignas(128) T q[Tiles::ROWS * Tiles::STRIDE];
  alignas(128) T grad_out[Tiles::ROWS * Tiles::STRIDE];
  float lse[Tiles::ROWS], delta[Tiles::ROWS];
};

template <class T>
struct QueriesArguments : AttentionInputs<T> {
  Packed<const T> grad_out, out;
  Packed<const Acc<T>> lse;
  Packed<T> grad_q;
  Packed<Acc<T>> delta;  // data is null where the caller has no use for it
  Partials<Acc<T>> partials;
  OwnColumnArguments<T> own;
};

/// lse times `unit`, and delta, of a tile's rows; a row that does not exist has lse = inf and so no probabilities.
/// Writes delta out where it is asked for, from the first of the blocks that share it. A warp takes a row at a time.
template <class T>
__device__ __forceinline__ void query_statistics(
    const QueriesArguments<T>& a, const Work& work, int rows, Acc<T>* lse, Acc<T>* delta, Acc<T> unit) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < rows; r += blockDim.x / 32) {
    A row_lse = INFINITY, row_delta = 0;
    if (work.rows.valid(r)) {
      const T *out = work.rows.at(a.out, r), *grad_out = work.rows.at(a.grad_out, r);
      for (int d = lane; d < a.dim; d += 32) row_delta += accurate(out[d]) * accurate(grad_out[d]);
      row_delta = warp_sum(row_delta);
      row_lse = *work.rows.at(a.lse, r);
      if (lane == 0 && work.first && a.delta.data != nullptr) *work.rows.at(a.delta, r) = row_delta;
    }
    if (lane == 0) {
      lse[r] = row_lse * unit;
      delta[r] = row_delta;
    }
  }
}

template <class T, int D, int ROW_WARPS>
__global__ void __launch_bounds__(128) attention_backward_queries_kernel(const QueriesArguments<T> a) {
  using Tiles = AttentionTiles<D, ROW_WARPS>;
  constexpr int STEP = Tiles::STEP, STAGES = Tiles::STAGES;
  using Shared = QueriesShared<T, D, ROW_WARPS>;
  DIFFMAS_SHARED(Shared, shared);
  if (const int own = a.own.row_of_block(); own >= 0) {
    if (blockIdx.x == 0) own_column(a.own, own, blockIdx.y, shared.own_column);
    return;
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_warp = ROW_WARPS == 1 ? 0 : warp, column_warp = ROW_WARPS == 1 ? warp : 0;

  Work work;
  if (!work.find(a.plan, blockIdx.z, Tiles::ROWS)) return;

  const int tiles = static_cast<int>(divide_up(work.end - work.begin, Tiles::COLUMNS));
  const auto copy = [&](int tile) {
    if (tile < tiles)
      copy_columns<D, Tiles::COLUMNS>(
          shared.columns[tile % STAGES][0], shared.columns[tile % STAGES][1], a, work.row, work.kv_head,
          work.begin + tile * Tiles::COLUMNS, work.end);
    commit_copies();
  };
  const auto valid = [&](int r) { return work.rows.valid(r); };
  copy_tile<D, Tiles::ROWS, Tiles::THREADS>(shared.q, [&](int r) { return work.rows.at(a.q, r); }, valid);
  copy_tile<D, Tiles::ROWS, Tiles::THREADS>(shared.grad_out, [&](int r) { return work.rows.at(a.grad_out, r); }, valid);
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; ++tile) copy(tile);

  query_statistics(a, work, Tiles::ROWS, shared.lse, shared.delta, LOG2E);
  __syncthreads();

  const int own_rows[2] = {row_warp * 16 + lane / 4, row_warp * 16 + lane / 4 + 8};
  const int limit[2] = {min(work.end, work.rows.end_seen(own_rows[0])), min(work.end, work.rows.end_seen(own_rows[1]))};
  const int first[2] = {work.rows.first_seen(own_rows[0]), work.rows.first_seen(own_rows[1])};
  const int seen_from = work.rows.first_seen(row_warp * 16 + 15);
  const int seen_to = min(work.end, work.rows.end_seen(row_warp * 16));
  const float lse[2] = {shared.lse[own_rows[0]], shared.lse[own_rows[1]]};
  const float delta[2] = {shared.delta[own_rows[0]], shared.delta[own_rows[1]]};
  const float scale2 = a.scale * LOG2E;
  const SoftCap<float> softcap{a.softcap.cap * LOG2E};
  float grad_q[D / 8][4] = {};

  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    copy(tile + STAGES - 1);
    const T *k_tile = shared.columns[tile % STAGES][0], *v_tile = shared.columns[tile % STAGES][1];
#pragma unroll
    for (int c = column_warp * 16; c < Tiles::COLUMNS; c += Tiles::COLUMN_WARPS * STEP * 8) {
      const int column = work.begin + tile * Tiles::COLUMNS + c;
      if (column >= work.end) break;
      float p[STEP][4], grad[STEP][4];
      multiply_rows<D, STEP>(p, shared.q + row_warp * 16 * Tiles::STRIDE, k_tile + c * Tiles::STRIDE);
      multiply_rows<D, STEP>(grad, shared.grad_out + row_warp * 16 * Tiles::STRIDE, v_tile + c * Tiles::STRIDE);
      const bool masked = column < seen_from || column + STEP * 8 > seen_to;
#pragma unroll
      for (int j = 0; j < STEP; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float score = softcap.score(p[j][i] * scale2);
          p[j][i] = exponential2(score - lse[i / 2]);
          grad[j][i] = softcap.gradient(score, p[j][i] * (grad[j][i] - delta[i / 2]));
          const int at = column + j * 8 + lane % 4 * 2 + i % 2;
          if (masked && (at < first[i / 2] || at >= limit[i / 2])) grad[j][i] = 0;
        }
#pragma unroll
      for (int j = 0; j < STEP; j += 2) {
        uint32_t operand[4];
        as_operand<T>(operand, grad[j], grad[j + 1]);
        accumulate_rows<D, D>(grad_q, operand, k_tile + (c + j * 8) * Tiles::STRIDE);
      }
    }
  }

  wait_copies<0>();
  __syncthreads();  // the results below take the place of the columns
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float* result = &shared.result[column_warp][own_rows[i]][n * 8 + lane % 4 * 2];
      result[0] = grad_q[n][2 * i];
      result[1] = grad_q[n][2 * i + 1];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < Tiles::ROWS * (D / 4); i += Tiles::THREADS) {
    const int r = i / (D / 4), d = i % (D / 4) * 4;
    if (!work.rows.valid(r)) break;
    float x[4] = {};
#pragma unroll
    for (int w = 0; w < Tiles::COLUMN_WARPS; ++w)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] += shared.result[w][r][d + e] * a.scale;
    store_result(a.grad_q, a.partials, work, r, d, x);
  }
}

}  // namespace diffmas
