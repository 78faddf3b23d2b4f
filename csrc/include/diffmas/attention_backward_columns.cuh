// cached_attention_backward_columns for 16-bit data: a block owns a tile of columns and streams the query rows past it,
// so that dK and dV are summed in registers in a fixed order and each accumulator element is read and written once.
#pragma once

#include "diffmas/attention.cuh"
#include "diffmas/tiles.cuh"

namespace diffmas {

template <int D>
struct ColumnTiles {
  static constexpr int THREADS = 128;
  /// Warps that share 16 columns, each summing an equal part of the head dims: 256 dims of dK and dV are more than one
  /// warp's registers. Both compute the scores.
  static constexpr int DIM_WARPS = D > 128 ? 2 : 1;
  static constexpr int COLUMNS = 64 / DIM_WARPS, DIMS = D / DIM_WARPS;
  /// As many query rows as let two tiles of them lie in flight within 99 KB, beside K and V.
  static constexpr int ROWS = D > 128 ? 16 : D == 128 ? 32 : 64, STAGES = 2;
  /// Fragments of eight query rows a warp handles at once.
  static constexpr int STEP = ROWS < 32 ? 2 : 4;
  static constexpr int STRIDE = TILE_STRIDE<D>;
};

template <class T, int D>
struct ColumnsShared {
  using Tiles = ColumnTiles<D>;
  alignas(128) T keys[Tiles::COLUMNS * Tiles::STRIDE];
  alignas(128) T values[Tiles::COLUMNS * Tiles::STRIDE];
  alignas(128) T q[Tiles::STAGES][Tiles::ROWS * Tiles::STRIDE];
  alignas(128) T grad_out[Tiles::STAGES][Tiles::ROWS * Tiles::STRIDE];
  alignas(16) float lse[Tiles::STAGES][Tiles::ROWS], delta[Tiles::STAGES][Tiles::ROWS];
};

template <class T>
struct ColumnsArguments : AttentionInputs<T> {
  Packed<const T> grad_out;
  Packed<const Acc<T>> lse, delta;
  Trace<Acc<T>> grad_keys, grad_values;
  const int32_t *column_begin, *column_end;
};

/// Grid: (column tiles, kv heads, batch).
template <class T, int D>
__global__ void __launch_bounds__(128) attention_backward_columns_kernel(const ColumnsArguments<T> a) {
  using Tiles = ColumnTiles<D>;
  constexpr int STEP = Tiles::STEP, ROWS = Tiles::ROWS, STAGES = Tiles::STAGES;
  using Shared = ColumnsShared<T, D>;
  DIFFMAS_SHARED(Shared, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.z, kv_head = blockIdx.y;
  const int begin = a.column_begin[row] + static_cast<int>(blockIdx.x) * Tiles::COLUMNS, end = a.column_end[row];
  QueryRows rows(a.plan, row, kv_head, 0);
  if (begin >= end || rows.count <= 0) return;
  const int skipped = rows.keep_seeing({begin, min(begin + Tiles::COLUMNS, end)});
  if (skipped >= rows.count) return;
  const int first = skipped / ROWS * ROWS;
  const int tiles = static_cast<int>(divide_up(rows.count - first, ROWS));

  const auto copy = [&](int tile) {
    if (tile < tiles) {
      QueryRows tile_rows = rows;
      tile_rows.first = first + tile * ROWS;
      const auto valid = [&](int r) { return tile_rows.valid(r); };
      const int stage = tile % STAGES;
      copy_tile<D, ROWS, 128>(shared.q[stage], [&](int r) { return tile_rows.at(a.q, r); }, valid);
      copy_tile<D, ROWS, 128>(shared.grad_out[stage], [&](int r) { return tile_rows.at(a.grad_out, r); }, valid);
      // Rows that do not exist have q, grad_out, lse and delta 0 and so contribute exactly 0.
      const int r = threadIdx.x % ROWS;
      const bool exists = valid(r);
      const auto statistic = threadIdx.x < ROWS ? a.lse : a.delta;
      float* target = threadIdx.x < ROWS ? shared.lse[stage] : shared.delta[stage];
      if (threadIdx.x < 2 * ROWS) copy_async<4>(target + r, tile_rows.at(statistic, exists ? r : 0), exists);
    }
    commit_copies();
  };
  const auto valid_column = [&](int c) { return begin + c < end; };
  copy_tile<D, Tiles::COLUMNS, 128>(
      shared.keys, [&](int c) { return a.keys.at(row, kv_head, begin + c); }, valid_column);
  copy_tile<D, Tiles::COLUMNS, 128>(
      shared.values, [&](int c) { return a.values.at(row, kv_head, begin + c); }, valid_column);
  copy(0);

  const int first_column = warp / Tiles::DIM_WARPS * 16, first_dim = warp % Tiles::DIM_WARPS * Tiles::DIMS;
  const T* k_tile = shared.keys + first_column * Tiles::STRIDE;
  const T* v_tile = shared.values + first_column * Tiles::STRIDE;
  const float scale2 = a.scale * LOG2E;
  const SoftCap<float> softcap{a.softcap.cap * LOG2E};
  // This lane's two columns, and where the first query stands that sees them no more.
  const int own_columns[2] = {begin + first_column + lane / 4, begin + first_column + lane / 4 + 8};
  const int64_t end_seeing[2] = {rows.mask.end_seeing(own_columns[0]), rows.mask.end_seeing(own_columns[1])};
  float grad_k[Tiles::DIMS / 8][4] = {}, grad_v[Tiles::DIMS / 8][4] = {};

  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<0>();
    __syncthreads();
    copy(tile + 1);
    const int stage = tile % STAGES;
#pragma unroll 1
    for (int r = 0; r < ROWS; r += STEP * 8) {
      rows.first = first + tile * ROWS + r;
      if (!rows.valid(0)) break;
      const T *q_tile = shared.q[stage] + r * Tiles::STRIDE, *grad_tile = shared.grad_out[stage] + r * Tiles::STRIDE;
      // Transposed against the forward: fragments hold 16 columns by query rows.
      float p[STEP][4], grad[STEP][4];
      multiply_rows<D, STEP>(p, k_tile, q_tile);
      multiply_rows<D, STEP>(grad, v_tile, grad_tile);
      const bool masked =
          begin + first_column + 15 >= rows.end_seen(0) || begin + first_column < rows.first_seen(STEP * 8 - 1);
#pragma unroll
      for (int j = 0; j < STEP; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = j * 8 + lane % 4 * 2 + i % 2;
          const float score = softcap.score(p[j][i] * scale2);
          p[j][i] = exponential2(score - shared.lse[stage][r + at] * LOG2E);
          if (masked && (own_columns[i / 2] >= rows.end_seen(at) || rows.position(at) >= end_seeing[i / 2]))
            p[j][i] = 0;
          grad[j][i] = softcap.gradient(score, p[j][i] * (grad[j][i] - shared.delta[stage][r + at]));
        }
#pragma unroll
      for (int j = 0; j < STEP; j += 2) {
        uint32_t operand[4];
        as_operand<T>(operand, p[j], p[j + 1]);
        accumulate_rows<D, Tiles::DIMS>(grad_v, operand, grad_tile + j * 8 * Tiles::STRIDE + first_dim);
        as_operand<T>(operand, grad[j], grad[j + 1]);
        accumulate_rows<D, Tiles::DIMS>(grad_k, operand, q_tile + j * 8 * Tiles::STRIDE + first_dim);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int column = own_columns[i];
    if (column >= end) continue;
    float* to_k = a.grad_keys.at(row, kv_head, column) + first_dim + lane % 4 * 2;
    float* to_v = a.grad_values.at(row, kv_head, column) + first_dim + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Tiles::DIMS / 8; ++n) {
      auto& k = *reinterpret_cast<Vector<float, 2>*>(to_k + n * 8);
      auto& v = *reinterpret_cast<Vector<float, 2>*>(to_v + n * 8);
      k = {{k.element[0] + a.scale * grad_k[n][2 * i], k.element[1] + a.scale * grad_k[n][2 * i + 1]}};
      v = {{v.element[0] + grad_v[n][2 * i], v.element[1] + grad_v[n][2 * i + 1]}};
    }
  }
}

}  // namespace diffmas
