// The attention kernels for every other type and head dim: float32 and float64 exactly, plain multiply-adds on tiles in
// shared memory. Work, splitting and results are those of the tensor-core kernels.
#pragma once

#include "diffmas/attention_backward_columns.cuh"
#include "diffmas/attention_backward_queries.cuh"

namespace diffmas {

/// Query rows, and columns, of a tile. Head dims are padded by one so that a warp reading down a tile meets every bank.
constexpr int SIMPLE_ROWS = 16, SIMPLE_THREADS = 128;
template <class T>
constexpr int SIMPLE_COLUMNS = std::is_same_v<T, double> ? 8 : 16;

/// f(m, n, sum over k of x(m, k) * y(n, k)) for m < M, n < N; a thread computes four m at once and so reads y once for
/// them.
template <class A, int M, class X, class Y, class F>
__device__ __forceinline__ void tile_product(int N, int K, X x, Y y, F f) {
  for (int i = threadIdx.x; i < M / 4 * N; i += SIMPLE_THREADS) {
    const int m = i / N * 4, n = i % N;
    A sum[4] = {};
    for (int k = 0; k < K; ++k) {
      const A right = y(n, k);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += x(m + j, k) * right;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) f(m + j, n, sum[j]);
  }
}

/// Rows of `dim` elements into a tile of accumulation type; zeros where not valid.
template <class A, class Source, class Valid>
__device__ __forceinline__ void load_tile(A* tile, int rows, int dim, Source source, Valid valid) {
  for (int i = threadIdx.x; i < rows * dim; i += SIMPLE_THREADS) {
    const int r = i / dim, d = i % dim;
    tile[r * (dim + 1) + d] = valid(r) ? accurate(source(r)[d]) : A(0);
  }
}

/// Shared memory as consecutive tiles of rows of dim + 1.
template <class A>
struct TileAllocator {
  A* next;
  int dim;
  __device__ __forceinline__ A* operator()(int rows) {
    A* tile = next;
    next += rows * (dim + 1);
    return tile;
  }
};

/// Elements of shared memory the simple kernels need: `tiles` row tiles, `column_tiles` column tiles, two score tiles
/// and three numbers per query row; at least what `own_column` needs.
template <class T>
constexpr int64_t simple_shared_elements(int dim, int row_tiles, int column_tiles) {
  return (row_tiles * SIMPLE_ROWS + column_tiles * SIMPLE_COLUMNS<T>)*int64_t(dim + 1) +
         2 * SIMPLE_ROWS * (SIMPLE_COLUMNS<T> + 1) + 3 * SIMPLE_ROWS;
}

template <class T>
__global__ void __launch_bounds__(SIMPLE_THREADS) attention_forward_simple_kernel(const ForwardArguments<T> a) {
  using A = Acc<T>;
  constexpr int ROWS = SIMPLE_ROWS, COLUMNS = SIMPLE_COLUMNS<T>, S = COLUMNS + 1;
  DIFFMAS_SHARED(A, shared);
  Work work;
  if (!work.find(a.plan, blockIdx.z, ROWS)) return;
  const int D = a.dim, stride = D + 1;
  TileAllocator<A> allocate{&shared, D};
  A *q = allocate(ROWS), *out = allocate(ROWS), *k = allocate(COLUMNS), *v = allocate(COLUMNS);
  A *s = allocate.next, *maximum = s + ROWS * S, *sum = maximum + ROWS, *rescale = sum + ROWS;

  load_tile(q, ROWS, D, [&](int r) { return work.rows.at(a.q, r); }, [&](int r) { return work.rows.valid(r); });
  for (int i = threadIdx.x; i < ROWS * stride; i += SIMPLE_THREADS) out[i] = 0;
  for (int r = threadIdx.x; r < ROWS; r += SIMPLE_THREADS) {
    maximum[r] = -INFINITY;
    sum[r] = 0;
  }
  for (int first = work.begin; first < work.end; first += COLUMNS) {
    const auto valid = [&](int c) { return first + c < work.end; };
    __syncthreads();
    load_tile(k, COLUMNS, D, [&](int c) { return a.keys.at(work.row, work.kv_head, first + c); }, valid);
    load_tile(v, COLUMNS, D, [&](int c) { return a.values.at(work.row, work.kv_head, first + c); }, valid);
    __syncthreads();
    tile_product<A, ROWS>(
        COLUMNS, D, [&](int r, int d) { return q[r * stride + d]; }, [&](int c, int d) { return k[c * stride + d]; },
        [&](int r, int c, A x) {
          s[r * S + c] = valid(c) && work.rows.sees(r, first + c) ? a.softcap.score(x * a.scale) : A(-INFINITY);
        });
    __syncthreads();
    for (int r = threadIdx.x; r < ROWS; r += SIMPLE_THREADS) {
      A highest = maximum[r], total = 0;
      for (int c = 0; c < COLUMNS; ++c) highest = max(highest, s[r * S + c]);
      const A base = highest == A(-INFINITY) ? A(0) : highest;
      for (int c = 0; c < COLUMNS; ++c) total += s[r * S + c] = exp(s[r * S + c] - base);
      rescale[r] = exp(maximum[r] - base);
      sum[r] = sum[r] * rescale[r] + total;
      maximum[r] = highest;
    }
    __syncthreads();
    tile_product<A, ROWS>(
        D, COLUMNS, [&](int r, int c) { return s[r * S + c]; }, [&](int d, int c) { return v[c * stride + d]; },
        [&](int r, int d, A x) { out[r * stride + d] = out[r * stride + d] * rescale[r] + x; });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * D; i += SIMPLE_THREADS) {
    const int r = i / D, d = i % D;
    if (!work.rows.valid(r)) break;
    const A x[1] = {sum[r] > 0 ? out[r * stride + d] / sum[r] : A(0)};
    store_result(a.out, a.partials, work, r, d, x);
    if (d == 0) store_lse(a, work, r, sum[r] > 0 ? maximum[r] + log(sum[r]) : A(-INFINITY));
  }
}

template <class T>
__global__ void __launch_bounds__(SIMPLE_THREADS)
    attention_backward_queries_simple_kernel(const QueriesArguments<T> a) {
  using A = Acc<T>;
  constexpr int ROWS = SIMPLE_ROWS, COLUMNS = SIMPLE_COLUMNS<T>, S = COLUMNS + 1;
  DIFFMAS_SHARED(A, shared);
  if (const int own = a.own.row_of_block(); own >= 0) {
    if (blockIdx.x == 0) own_column(a.own, own, blockIdx.y, &shared);
    return;
  }
  Work work;
  if (!work.find(a.plan, blockIdx.z, ROWS)) return;
  const int D = a.dim, stride = D + 1;
  TileAllocator<A> allocate{&shared, D};
  A *q = allocate(ROWS), *grad_out = allocate(ROWS), *grad_q = allocate(ROWS);
  A *k = allocate(COLUMNS), *v = allocate(COLUMNS);
  A *score = allocate.next, *grad = score + ROWS * S, *lse = grad + ROWS * S, *delta = lse + ROWS;
  // A score that is not seen is infinite and has no slope.
  const auto gradient = [&](A of, A row_lse, A grad_p) {
    return of == A(-INFINITY) ? A(0) : a.softcap.gradient(of, exp(of - row_lse) * grad_p);
  };

  const auto valid_row = [&](int r) { return work.rows.valid(r); };
  load_tile(q, ROWS, D, [&](int r) { return work.rows.at(a.q, r); }, valid_row);
  load_tile(grad_out, ROWS, D, [&](int r) { return work.rows.at(a.grad_out, r); }, valid_row);
  for (int i = threadIdx.x; i < ROWS * stride; i += SIMPLE_THREADS) grad_q[i] = 0;
  query_statistics(a, work, ROWS, lse, delta, A(1));
  for (int first = work.begin; first < work.end; first += COLUMNS) {
    const auto valid = [&](int c) { return first + c < work.end; };
    __syncthreads();
    load_tile(k, COLUMNS, D, [&](int c) { return a.keys.at(work.row, work.kv_head, first + c); }, valid);
    load_tile(v, COLUMNS, D, [&](int c) { return a.values.at(work.row, work.kv_head, first + c); }, valid);
    __syncthreads();
    tile_product<A, ROWS>(
        COLUMNS, D, [&](int r, int d) { return q[r * stride + d]; }, [&](int c, int d) { return k[c * stride + d]; },
        [&](int r, int c, A x) {
          score[r * S + c] = valid(c) && work.rows.sees(r, first + c) ? a.softcap.score(x * a.scale) : A(-INFINITY);
        });
    // The thread that wrote a score is the one that reads it here.
    tile_product<A, ROWS>(
        COLUMNS, D, [&](int r, int d) { return grad_out[r * stride + d]; },
        [&](int c, int d) { return v[c * stride + d]; },
        [&](int r, int c, A x) { grad[r * S + c] = gradient(score[r * S + c], lse[r], x - delta[r]); });
    __syncthreads();
    tile_product<A, ROWS>(
        D, COLUMNS, [&](int r, int c) { return grad[r * S + c]; }, [&](int d, int c) { return k[c * stride + d]; },
        [&](int r, int d, A x) { grad_q[r * stride + d] += x; });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * D; i += SIMPLE_THREADS) {
    const int r = i / D, d = i % D;
    if (!valid_row(r)) break;
    const A x[1] = {grad_q[r * stride + d] * a.scale};
    store_result(a.grad_q, a.partials, work, r, d, x);
  }
}

/// Grid: (tiles of SIMPLE_COLUMNS, kv heads, batch).
template <class T>
__global__ void __launch_bounds__(SIMPLE_THREADS)
    attention_backward_columns_simple_kernel(const ColumnsArguments<T> a) {
  using A = Acc<T>;
  constexpr int ROWS = SIMPLE_ROWS, COLUMNS = SIMPLE_COLUMNS<T>, S = COLUMNS + 1;
  DIFFMAS_SHARED(A, shared);
  const int row = blockIdx.z, kv_head = blockIdx.y;
  const int begin = a.column_begin[row] + static_cast<int>(blockIdx.x) * COLUMNS, end = a.column_end[row];
  QueryRows rows(a.plan, row, kv_head, 0);
  if (begin >= end) return;
  const int skipped = rows.keep_seeing({begin, min(begin + COLUMNS, end)});
  if (skipped >= rows.count) return;
  const int D = a.dim, stride = D + 1;
  TileAllocator<A> allocate{&shared, D};
  A *q = allocate(ROWS), *grad_out = allocate(ROWS), *k = allocate(COLUMNS), *v = allocate(COLUMNS);
  A *grad_k = allocate(COLUMNS), *grad_v = allocate(COLUMNS);
  A *p = allocate.next, *grad = p + ROWS * S, *lse = grad + ROWS * S, *delta = lse + ROWS;

  const auto valid_column = [&](int c) { return begin + c < end; };
  load_tile(k, COLUMNS, D, [&](int c) { return a.keys.at(row, kv_head, begin + c); }, valid_column);
  load_tile(v, COLUMNS, D, [&](int c) { return a.values.at(row, kv_head, begin + c); }, valid_column);
  for (int i = threadIdx.x; i < 2 * COLUMNS * stride; i += SIMPLE_THREADS) grad_k[i] = 0;
  for (rows.first = skipped; rows.valid(0); rows.first += ROWS) {
    const auto valid = [&](int r) { return rows.valid(r); };
    __syncthreads();
    load_tile(q, ROWS, D, [&](int r) { return rows.at(a.q, r); }, valid);
    load_tile(grad_out, ROWS, D, [&](int r) { return rows.at(a.grad_out, r); }, valid);
    for (int r = threadIdx.x; r < ROWS; r += SIMPLE_THREADS) {
      lse[r] = valid(r) ? *rows.at(a.lse, r) : A(INFINITY);
      delta[r] = valid(r) ? *rows.at(a.delta, r) : A(0);
    }
    __syncthreads();
    tile_product<A, ROWS>(
        COLUMNS, D, [&](int r, int d) { return q[r * stride + d]; }, [&](int c, int d) { return k[c * stride + d]; },
        [&](int r, int c, A x) {
          const A score = a.softcap.score(x * a.scale);
          p[r * S + c] = rows.sees(r, begin + c) ? exp(score - lse[r]) : A(0);
          // What the gradient is multiplied by on its way through the cap.
          grad[r * S + c] = a.softcap.gradient(score, A(1));
        });
    tile_product<A, ROWS>(
        COLUMNS, D, [&](int r, int d) { return grad_out[r * stride + d]; },
        [&](int c, int d) { return v[c * stride + d]; },
        [&](int r, int c, A x) { grad[r * S + c] *= p[r * S + c] * (x - delta[r]); });
    __syncthreads();
    tile_product<A, COLUMNS>(
        D, ROWS, [&](int c, int r) { return grad[r * S + c]; }, [&](int d, int r) { return q[r * stride + d]; },
        [&](int c, int d, A x) { grad_k[c * stride + d] += x; });
    tile_product<A, COLUMNS>(
        D, ROWS, [&](int c, int r) { return p[r * S + c]; }, [&](int d, int r) { return grad_out[r * stride + d]; },
        [&](int c, int d, A x) { grad_v[c * stride + d] += x; });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < COLUMNS * D; i += SIMPLE_THREADS) {
    const int c = i / D, d = i % D;
    if (!valid_column(c)) break;
    a.grad_keys.at(row, kv_head, begin + c)[d] += a.scale * grad_k[c * stride + d];
    a.grad_values.at(row, kv_head, begin + c)[d] += grad_v[c * stride + d];
  }
}

}  // namespace diffmas
