// Products of 16-bit tiles in shared memory by tensor cores, one warp at a time.
#pragma once

#include "diffmas/device.cuh"

namespace diffmas {

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

/// Elements from one row of a shared tile to the next. Eight more than the row has: the eight rows that one 8x8 matrix
/// load touches then lie in different banks, whatever multiple of 32 elements the row is.
template <int D>
constexpr int TILE_STRIDE = D + 8;

/// Starts copying ROWS rows of D elements into a shared tile, all threads together. `source(r)` is the address of row r
/// and `valid(r)` whether there is one; the other rows become zero.
template <int D, int ROWS, int THREADS, class T, class Source, class Valid>
__device__ __forceinline__ void copy_tile(T* tile, Source source, Valid valid) {
  constexpr int CHUNKS = D / 8;
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, element = i % CHUNKS * 8;
    const bool exists = valid(row);
    copy_async<16>(tile + row * TILE_STRIDE<D> + element, source(exists ? row : 0) + element, exists);
  }
}

/// s [16, 8 N] += a b^T over DIMS dims, for 16 rows of tile `a` and 8 N rows of tile `b`, both of row length D and from
/// the elements pointed to; s[j] is the fragment of columns 8j….
template <int D, int DIMS, int N, class T>
__device__ __forceinline__ void add_row_products(float (&s)[N][4], const T* a, const T* b) {
  const int lane = threadIdx.x % 32;
  const T* a_row = a + lane % 16 * TILE_STRIDE<D> + lane / 16 * 8;
  const T* b_row = b + (lane % 8 + lane / 16 * 8) * TILE_STRIDE<D> + lane / 8 % 2 * 8;
#pragma unroll
  for (int d = 0; d < DIMS; d += 16) {
    uint32_t left[4];
    load_matrices<false>(left, a_row + d);
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t right[4];
      load_matrices<false>(right, b_row + j * 8 * TILE_STRIDE<D> + d);
      multiply_accumulate<T>(s[j], left, right[0], right[1]);
      multiply_accumulate<T>(s[j + 1], left, right[2], right[3]);
    }
  }
}

/// The same over all dims, from zero.
template <int D, int N, class T>
__device__ __forceinline__ void multiply_rows(float (&s)[N][4], const T* a, const T* b) {
#pragma unroll
  for (int j = 0; j < N; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = 0;
  add_row_products<D, D>(s, a, b);
}

/// o [16, N] += p b for 16 rows of tile `b` of row length D, from its element pointed to; o[j] is the fragment of dims
/// 8j….
template <int D, int N, class T>
__device__ __forceinline__ void accumulate_rows(float (&o)[N / 8][4], const uint32_t (&p)[4], const T* b) {
  const int lane = threadIdx.x % 32;
  const T* b_row = b + lane % 16 * TILE_STRIDE<D> + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < N; n += 16) {
    uint32_t right[4];
    load_matrices<true>(right, b_row + n);
    multiply_accumulate<T>(o[n / 8], p, right[0], right[1]);
    multiply_accumulate<T>(o[n / 8 + 1], p, right[2], right[3]);
  }
}

/// The accumulator fragments of columns 0…7 and 8…15 as the 16-bit left operand of the next product.
template <class T>
__device__ __forceinline__ void as_operand(uint32_t (&p)[4], const float (&low)[4], const float (&high)[4]) {
  p[0] = pack<T>(low[0], low[1]);
  p[1] = pack<T>(low[2], low[3]);
  p[2] = pack<T>(high[0], high[1]);
  p[3] = pack<T>(high[2], high[3]);
}

}  // namespace diffmas
