// Register-blocked products of small tiles. Every sum runs over k in ascending order, whatever the tile's other sizes,
// and is added to what is there as a whole: long sums over many tiles are blocked sums, with less rounding error.
#pragma once

#include "cpu/kernels/simd.h"

namespace diffmas {
namespace DIFFMAS_ISA {

constexpr int ROWS = VECTOR_REGISTERS == 32 ? 8 : 6;
constexpr int VECTORS = 2;

// The right factor may be stored as S, another type than T that the sums are in: it is converted on its way into the
// registers, which pays where it is read once.

/// Whether element (i, k) of the left factor is a[i * lda + k] or a[k * lda + i].
enum class Left { RowMajor, ColumnMajor };
enum class Into { Overwrite, Add };

/// c[i][0 .. NV * W) (+)= sum_k A(i, k) * b[k][0 .. NV * W) for i < M.
template <Into INTO, Left LEFT, int M, int NV, class T, class S>
inline void block(T* c, int64_t ldc, const T* a, int64_t lda, const S* b, int64_t ldb, int64_t K) {
  Vec<T> sum[M][NV] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = load(b + k * ldb + j * W<T>);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const T left = LEFT == Left::RowMajor ? a[i * lda + k] : a[k * lda + i];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      T* target = c + i * ldc + j * W<T>;
      store(target, INTO == Into::Add ? load(target) + sum[i][j] : sum[i][j]);
    }
}

template <Into INTO, Left LEFT, int M, int NV, class T, class S>
inline void block_of(int64_t rows, T* c, int64_t ldc, const T* a, int64_t lda, const S* b, int64_t ldb, int64_t K) {
  if (rows == M) {
    block<INTO, LEFT, M, NV>(c, ldc, a, lda, b, ldb, K);
  } else if constexpr (M > 1) {
    block_of<INTO, LEFT, M - 1, NV>(rows, c, ldc, a, lda, b, ldb, K);
  }
}

/// `rows` rows of one panel of NV vectors.
template <Into INTO, Left LEFT, int NV, class T, class S>
__attribute__((noinline)) void panel(
    int64_t rows, T* c, int64_t ldc, const T* a, int64_t lda, const S* b, int64_t ldb, int64_t K) {
  const int64_t step = LEFT == Left::RowMajor ? lda : 1;
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS) block<INTO, LEFT, ROWS, NV>(c + i * ldc, ldc, a + i * step, lda, b, ldb, K);
  if (i < rows) block_of<INTO, LEFT, ROWS - 1, NV>(rows - i, c + i * ldc, ldc, a + i * step, lda, b, ldb, K);
}

/// `product` for one row, which is bound by the reading of b: the hardware does not foresee it across pages.
template <Into INTO, Left LEFT, class T, class S>
inline int64_t row_product(int64_t columns, T* c, const T* a, int64_t lda, const S* b, int64_t ldb, int64_t K) {
  constexpr int64_t width = VECTORS * W<T>, ahead = 512;
  int64_t j = 0;
  for (; j + width <= columns; j += width) {
    // Further on in the rows that are read, or at the beginning of the next K.
    const S* next = j + ahead < columns ? b + j + ahead : b + K * ldb + j + ahead - columns;
    for (int64_t k = 0; k < K; ++k)
      for (int i = 0; i < VECTORS; ++i) __builtin_prefetch(next + k * ldb + i * W<T>);
    block<INTO, LEFT, 1, VECTORS>(c + j, 0, a, lda, b + j, ldb, K);
  }
  return j;
}

/// c[rows][columns] (+)= A b, for `columns` a multiple of W.
template <Into INTO, Left LEFT, class T, class S>
inline void product(
    int64_t rows, int64_t columns, T* c, int64_t ldc, const T* a, int64_t lda, const S* b, int64_t ldb, int64_t K) {
  int64_t j = rows == 1 ? row_product<INTO, LEFT>(columns, c, a, lda, b, ldb, K) : 0;
  for (; j + VECTORS * W<T> <= columns; j += VECTORS * W<T>)
    panel<INTO, LEFT, VECTORS>(rows, c + j, ldc, a, lda, b + j, ldb, K);
  for (; j < columns; j += W<T>) panel<INTO, LEFT, 1>(rows, c + j, ldc, a, lda, b + j, ldb, K);
}

/// Asks for what is read once and comes from memory: it goes to L2, which takes more requests at a time than L1.
inline void foresee(const void* address) { __builtin_prefetch(address, 0, 2); }

/// `product` for a right factor that is read once and goes on behind its K rows: asks for rows further on meanwhile.
template <Into INTO, Left LEFT, class T, class S>
inline void streamed_product(
    int64_t rows, int64_t columns, T* c, int64_t ldc, const T* a, int64_t lda, const S* b, int64_t ldb, int64_t K) {
  const S* next = b + 2 * K * ldb;
  const auto step = [&](auto vectors, int64_t j) {
    for (int64_t k = 0; k < K; ++k)
      for (int i = 0; i < vectors.value; ++i) foresee(next + k * ldb + j + i * W<T>);
    panel<INTO, LEFT, vectors.value>(rows, c + j, ldc, a, lda, b + j, ldb, K);
  };
  int64_t j = 0;
  for (; j + VECTORS * W<T> <= columns; j += VECTORS * W<T>) step(std::integral_constant<int, VECTORS>(), j);
  for (; j < columns; j += W<T>) step(std::integral_constant<int, 1>(), j);
}

/// AHEAD: vectors that each step asks for behind `ahead`.
template <int ROWS_X, int ROWS_Y, int AHEAD, class T, class S>
inline void dots_block(T* s, int64_t lds, const T* x, int64_t ldx, const S* y, int64_t ldy, int64_t K, const S* ahead) {
  Vec<T> sum[ROWS_X][4] = {};
  for (int64_t k = 0; k < K; k += W<T>) {
    Vec<T> right[ROWS_Y];
#pragma GCC unroll 4
    for (int j = 0; j < ROWS_Y; ++j) right[j] = load(y + j * ldy + k);
#pragma GCC unroll 4
    for (int i = 0; i < AHEAD; ++i) foresee(ahead + AHEAD * k + i * W<T>);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS_X; ++i) {
      const Vec<T> left = load(x + i * ldx + k);
#pragma GCC unroll 4
      for (int j = 0; j < ROWS_Y; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < ROWS_X; ++i) {
    T totals[4];
    sums<T>(sum[i], totals);
    __builtin_memcpy(s + i * lds, totals, sizeof(T) * ROWS_Y);
  }
}

/// The blocks of x share in asking for the y rows after the next ones.
template <int ROWS_Y, class T, class S>
inline void dots_rows(int64_t rows_x, T* s, int64_t lds, const T* x, int64_t ldx, const S* y, int64_t ldy, int64_t K) {
  constexpr int TOGETHER = VECTOR_REGISTERS == 32 ? 4 : 2;
  const S* ahead = y + 2 * ROWS_Y * ldy;
  int64_t i = 0;
  if (rows_x < 2 * TOGETHER) {
    if (rows_x >= TOGETHER) {
      dots_block<TOGETHER, ROWS_Y, ROWS_Y>(s, lds, x, ldx, y, ldy, K, ahead);
      i = TOGETHER;
    } else if (rows_x > 0) {
      dots_block<1, ROWS_Y, ROWS_Y>(s, lds, x, ldx, y, ldy, K, ahead);
      i = 1;
    }
  }
  for (; i + TOGETHER <= rows_x; i += TOGETHER)
    dots_block<TOGETHER, ROWS_Y, 1>(s + i * lds, lds, x + i * ldx, ldx, y, ldy, K, ahead + i / TOGETHER * K);
  for (; i < rows_x; ++i) dots_block<1, ROWS_Y, 0>(s + i * lds, lds, x + i * ldx, ldx, y, ldy, K, ahead);
}

/// s[i][j] = sum_k x[i][k] * y[j][k], for few rows x and K a multiple of W: nothing is transposed, y is read once.
template <class T, class S>
inline void dots(
    int64_t rows_x, int64_t rows_y, T* s, int64_t lds, const T* x, int64_t ldx, const S* y, int64_t ldy, int64_t K) {
  int64_t j = 0;
  for (; j + 4 <= rows_y; j += 4) dots_rows<4>(rows_x, s + j, lds, x, ldx, y + j * ldy, ldy, K);
  for (; j < rows_y; ++j) dots_rows<1>(rows_x, s + j, lds, x, ldx, y + j * ldy, ldy, K);
}

}  // namespace DIFFMAS_ISA
}  // namespace diffmas
