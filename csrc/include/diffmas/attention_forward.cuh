// cached_attention for 16-bit data: a FlashAttention-2 tile loop (arXiv 2307.08691) over packed query rows.
#pragma once

#include "diffmas/attention.cuh"
#include "diffmas/tiles.cuh"

namespace diffmas {

/// Four warps. ROW_WARPS = 1: all four share 16 query rows and take every fourth 16 columns; for few query rows, where
/// reading K and V is the cost. ROW_WARPS = 4: each has 16 query rows of its own and takes all columns.
template <int D, int ROW_WARPS>
struct AttentionTiles {
  static constexpr int THREADS = 128, COLUMN_WARPS = 4 / ROW_WARPS;
  static constexpr int ROWS = 16 * ROW_WARPS;
  static constexpr int COLUMNS = ROW_WARPS == 4 && D >= 128 ? 32 : 64;
  /// Fragments of eight columns a warp handles at once.
  static constexpr int STEP = ROW_WARPS == 4 ? 4 : 2;
  /// Tiles in flight: up to head dim 128 as many as the 99 KB hold that every device of compute capability 8.0 and up
  /// grants.
  static constexpr int STAGES = ROW_WARPS == 4 || D >= 128 ? 2 : D == 96 ? 3 : 4;
  static constexpr int STRIDE = TILE_STRIDE<D>;
  /// Row length of the float32 results that the warps exchange at the end.
  static constexpr int RESULT_STRIDE = D + 4;
};

template <class T, int D, int ROW_WARPS>
struct ForwardShared {
  using Tiles = AttentionTiles<D, ROW_WARPS>;
  union alignas(128) {
    T columns[Tiles::STAGES][2][Tiles::COLUMNS * Tiles::STRIDE];
    float result[Tiles::COLUMN_WARPS][Tiles::ROWS][Tiles::RESULT_STRIDE];
  };
  alignas(128) T q[Tiles::ROWS * Tiles::STRIDE];
  float maximum[Tiles::COLUMN_WARPS][Tiles::ROWS], sum[Tiles::COLUMN_WARPS][Tiles::ROWS];
};

/// New keys and values that the kernel itself appends, of calls of at most one token a row; data is null otherwise.
template <class T>
struct NewColumns {
  Packed<const T> k, v;
  Trace<T> keys, values;
};

template <class T>
struct ForwardArguments : AttentionInputs<T> {
  NewColumns<T> appended;
  Packed<T> out;
  Packed<Acc<T>> lse;
  Partials<Acc<T>> partials;
};

/// Where the result of packed row r of a block's tile goes: its place in the output, or in the slot's partial result.
template <class T>
__device__ __forceinline__ void store_lse(const ForwardArguments<T>& a, const Work& work, int r, Acc<T> lse) {
  if (work.slot < 0)
    *work.rows.at(a.lse, r) = lse;
  else
    a.partials.lse[a.partials.index(work.slot, work.kv_head, work.rows.first + r)] = lse;
}

/// The same for N neighbouring elements from dim `d` on.
template <class T, class A, int N>
__device__ __forceinline__ void store_result(
    const Packed<T>& out, const Partials<A>& partials, const Work& work, int r, int d, const A (&x)[N]) {
  if (work.slot < 0) {
    Vector<T, N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) y.element[i] = rounded<T>(x[i]);
    *reinterpret_cast<Vector<T, N>*>(work.rows.at(out, r) + d) = y;
  } else {
    Vector<A, N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) y.element[i] = x[i];
    const int64_t row = partials.index(work.slot, work.kv_head, work.rows.first + r);
    *reinterpret_cast<Vector<A, N>*>(partials.out + row * partials.dim + d) = y;
  }
}

/// Starts copying a tile of columns of K and V; columns from `end` on become zero.
template <int D, int COLUMNS, class T>
__device__ __forceinline__ void copy_columns(
    T* k_tile, T* v_tile, const AttentionInputs<T>& a, int row, int kv_head, int begin, int end) {
  const auto valid = [&](int c) { return begin + c < end; };
  copy_tile<D, COLUMNS, 128>(k_tile, [&](int c) { return a.keys.at(row, kv_head, begin + c); }, valid);
  copy_tile<D, COLUMNS, 128>(v_tile, [&](int c) { return a.values.at(row, kv_head, begin + c); }, valid);
}

template <class T, int D, int ROW_WARPS>
__global__ void __launch_bounds__(128) attention_forward_kernel(const ForwardArguments<T> a) {
  using Tiles = AttentionTiles<D, ROW_WARPS>;
  constexpr int STEP = Tiles::STEP, STAGES = Tiles::STAGES;
  using Shared = ForwardShared<T, D, ROW_WARPS>;
  DIFFMAS_SHARED(Shared, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_warp = ROW_WARPS == 1 ? 0 : warp, column_warp = ROW_WARPS == 1 ? warp : 0;

  Work work;
  if (!work.find(a.plan, blockIdx.z, Tiles::ROWS)) return;

  if (a.appended.k.data != nullptr && work.end == seen_columns(a.plan, work.row).end) {
    const int column = work.end - 1;
    const T* k = a.appended.k.at(work.rows.token, work.kv_head);
    const T* v = a.appended.v.at(work.rows.token, work.kv_head);
    for (int d = threadIdx.x; d < D; d += Tiles::THREADS) {
      a.appended.keys.at(work.row, work.kv_head, column)[d] = k[d];
      a.appended.values.at(work.row, work.kv_head, column)[d] = v[d];
    }
    __syncthreads();
  }

  const int tiles = static_cast<int>(divide_up(work.end - work.begin, Tiles::COLUMNS));
  const auto copy = [&](int tile) {
    if (tile < tiles)
      copy_columns<D, Tiles::COLUMNS>(
          shared.columns[tile % STAGES][0], shared.columns[tile % STAGES][1], a, work.row, work.kv_head,
          work.begin + tile * Tiles::COLUMNS, work.end);
    commit_copies();
  };
  copy_tile<D, Tiles::ROWS, Tiles::THREADS>(
      shared.q, [&](int r) { return work.rows.at(a.q, r); }, [&](int r) { return work.rows.valid(r); });
#pragma unroll
  for (int tile = 0; tile < STAGES - 1; ++tile) copy(tile);

  // This lane's two rows of the warp's 16, the first column each of them sees, and the one behind the last.
  const int own_rows[2] = {row_warp * 16 + lane / 4, row_warp * 16 + lane / 4 + 8};
  const int limit[2] = {min(work.end, work.rows.end_seen(own_rows[0])), min(work.end, work.rows.end_seen(own_rows[1]))};
  const int first[2] = {work.rows.first_seen(own_rows[0]), work.rows.first_seen(own_rows[1])};
  // All of the warp's rows see the columns between these two.
  const int seen_from = work.rows.first_seen(row_warp * 16 + 15);
  const int seen_to = min(work.end, work.rows.end_seen(row_warp * 16));
  const float scale2 = a.scale * LOG2E;  // scores in powers of two
  const SoftCap<float> softcap{a.softcap.cap * LOG2E};
  float out[D / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    copy(tile + STAGES - 1);
    const T *k_tile = shared.columns[tile % STAGES][0], *v_tile = shared.columns[tile % STAGES][1];
#pragma unroll
    for (int c = column_warp * 16; c < Tiles::COLUMNS; c += Tiles::COLUMN_WARPS * STEP * 8) {
      const int column = work.begin + tile * Tiles::COLUMNS + c;
      if (column >= work.end) break;
      float s[STEP][4];
      multiply_rows<D, STEP>(s, shared.q + row_warp * 16 * Tiles::STRIDE, k_tile + c * Tiles::STRIDE);
#pragma unroll
      for (int j = 0; j < STEP; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[j][i] = softcap.score(s[j][i] * scale2);
      if (column < seen_from || column + STEP * 8 > seen_to) {
#pragma unroll
        for (int j = 0; j < STEP; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = column + j * 8 + lane % 4 * 2 + i % 2;
            if (at < first[i / 2] || at >= limit[i / 2]) s[j][i] = -INFINITY;
          }
      }
      float base[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float highest = maximum[i];
#pragma unroll
        for (int j = 0; j < STEP; ++j) highest = fmaxf(highest, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
        highest = quad_max(highest);
        // With every column masked so far, -inf - -inf must not become NaN.
        base[i] = highest == -INFINITY ? 0.0f : highest;
        const float rescale = exponential2(maximum[i] - base[i]);
        maximum[i] = highest;
        sum[i] *= rescale;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out[n][2 * i] *= rescale;
          out[n][2 * i + 1] *= rescale;
        }
      }
#pragma unroll
      for (int j = 0; j < STEP; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[j][i] = exponential2(s[j][i] - base[i / 2]);
          sum[i / 2] += s[j][i];
        }
#pragma unroll
      for (int j = 0; j < STEP; j += 2) {
        uint32_t p[4];
        as_operand<T>(p, s[j], s[j + 1]);
        accumulate_rows<D, D>(out, p, v_tile + (c + j * 8) * Tiles::STRIDE);
      }
    }
  }

  wait_copies<0>();
  __syncthreads();  // the results below take the place of the columns
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sum[i] = quad_sum(sum[i]);
    if (lane % 4 == 0) {
      shared.maximum[column_warp][own_rows[i]] = maximum[i];
      shared.sum[column_warp][own_rows[i]] = sum[i];
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float* result = &shared.result[column_warp][own_rows[i]][n * 8 + lane % 4 * 2];
      result[0] = out[n][2 * i];
      result[1] = out[n][2 * i + 1];
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < Tiles::ROWS * (D / 4); i += Tiles::THREADS) {
    const int r = i / (D / 4), d = i % (D / 4) * 4;
    if (!work.rows.valid(r)) break;
    float highest = -INFINITY, weight[Tiles::COLUMN_WARPS], total = 0, x[4] = {};
#pragma unroll
    for (int w = 0; w < Tiles::COLUMN_WARPS; ++w) highest = fmaxf(highest, shared.maximum[w][r]);
    const float base = highest == -INFINITY ? 0.0f : highest;
#pragma unroll
    for (int w = 0; w < Tiles::COLUMN_WARPS; ++w) {
      weight[w] = exponential2(shared.maximum[w][r] - base);
      total += weight[w] * shared.sum[w][r];
    }
    const float inverse = total > 0 ? 1 / total : 0.0f;
#pragma unroll
    for (int w = 0; w < Tiles::COLUMN_WARPS; ++w)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] += weight[w] * inverse * shared.result[w][r][d + e];
    store_result(a.out, a.partials, work, r, d, x);
    if (d == 0) store_lse(a, work, r, total > 0 ? highest * LN2 + logf(total) : -INFINITY);
  }
}

}  // namespace diffmas
