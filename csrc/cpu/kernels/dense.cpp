// Products of many rows: the right factor goes to a buffer, panel by panel, and the left one is read where it stands.
#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

namespace {

template <class T>
using Index = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;

/// Exchanges the blocks of STEP lanes that lie off the diagonal of each pair of rows STEP apart.
template <int STEP, class T>
inline void exchange_blocks(Vec<T>* rows) {
  typedef Index<T> Lanes __attribute__((vector_size(sizeof(Vec<T>))));
  Lanes upper, lower;
  for (int l = 0; l < W<T>; ++l) {
    upper[l] = l & STEP ? W<T> + l - STEP : l;
    lower[l] = l & STEP ? W<T> + l : l + STEP;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W<T>; ++i) {
    if (i & STEP) continue;
    const Vec<T> a = rows[i], b = rows[i + STEP];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + STEP] = __builtin_shuffle(a, b, lower);
  }
  if constexpr (STEP > 1) exchange_blocks<STEP / 2, T>(rows);
}

/// panel[k][j] = b[j][k] for k < depth and j < count, zero for the other columns of the vector.
template <class T>
inline void pack_transposed(T* panel, int64_t stride, const T* b, int64_t ldb, int64_t depth, int64_t count) {
  int64_t k = 0;
  for (; k + W<T> <= depth; k += W<T>) {
    Vec<T> rows[W<T>];
#pragma GCC unroll 16
    for (int j = 0; j < W<T>; ++j) rows[j] = j < count ? load(b + j * ldb + k) : Vec<T>{};
    exchange_blocks<W<T> / 2, T>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < W<T>; ++i) store(panel + (k + i) * stride, rows[i]);
  }
  for (; k < depth; ++k)
    for (int64_t j = 0; j < W<T>; ++j) panel[k * stride + j] = j < count ? b[j * ldb + k] : T(0);
}

template <class T>
inline void pack(T* panel, int64_t stride, const T* b, int64_t ldb, int64_t depth, int64_t count) {
  for (int64_t k = 0; k < depth; ++k)
    store(panel + k * stride, count < W<T> ? load_partial(b + k * ldb, count) : load(b + k * ldb));
}

}  // namespace

/// Sums are cut into stretches of DENSE_DEPTH terms, which are added as wholes.
template <class T>
void dense_product(const DenseProduct<T>& p, T* scratch) {
  Pieces<T> pieces(scratch);
  T* const panel_of_b = pieces.take(DENSE_DEPTH * VECTORS * W<T>);
  T* const spare = pieces.take(p.rows * W<T>);
  const auto product = [&](auto vectors, auto left, T* c, int64_t ldc, const T* a, int64_t depth, bool add) {
    constexpr int NV = decltype(vectors)::value;
    constexpr Left LEFT = decltype(left)::value;
    if (add)
      panel<Into::Add, LEFT, NV>(p.rows, c, ldc, a, p.a_stride, panel_of_b, NV * W<T>, depth);
    else
      panel<Into::Overwrite, LEFT, NV>(p.rows, c, ldc, a, p.a_stride, panel_of_b, NV * W<T>, depth);
  };
  const auto with_left = [&](auto vectors, T* c, int64_t ldc, int64_t k, int64_t depth, bool add) {
    if (p.a_transposed)
      product(vectors, std::integral_constant<Left, Left::ColumnMajor>(), c, ldc, p.a + k * p.a_stride, depth, add);
    else
      product(vectors, std::integral_constant<Left, Left::RowMajor>(), c, ldc, p.a + k, depth, add);
  };
  for (int64_t k = 0; k == 0 || k < p.depth; k += DENSE_DEPTH) {
    const int64_t depth = smaller(DENSE_DEPTH, p.depth - k);
    const bool add = p.add || k > 0;
    for (int64_t j = 0; j < p.columns;) {
      const int64_t rest = p.columns - j;
      const int vectors = rest >= VECTORS * W<T> ? VECTORS : 1;
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = j + v * W<T>, count = smaller(W<T>, p.columns - at);
        if (p.b_transposed)
          pack_transposed(panel_of_b + v * W<T>, vectors * W<T>, p.b + at * p.b_stride + k, p.b_stride, depth, count);
        else
          pack(panel_of_b + v * W<T>, vectors * W<T>, p.b + k * p.b_stride + at, p.b_stride, depth, count);
      }
      if (vectors == VECTORS) {
        with_left(std::integral_constant<int, VECTORS>(), p.c + j, p.c_stride, k, depth, add);
      } else if (rest >= W<T>) {
        with_left(std::integral_constant<int, 1>(), p.c + j, p.c_stride, k, depth, add);
      } else {
        with_left(std::integral_constant<int, 1>(), spare, W<T>, k, depth, false);
        for (int64_t i = 0; i < p.rows; ++i)
          for (int64_t d = 0; d < rest; ++d) {
            T& c = p.c[i * p.c_stride + j + d];
            c = add ? c + spare[i * W<T> + d] : spare[i * W<T> + d];
          }
      }
      j += vectors * W<T>;
    }
  }
}

template void dense_product<float>(const DenseProduct<float>&, float*);
template void dense_product<double>(const DenseProduct<double>&, double*);

}  // namespace DIFFMAS_ISA
}  // namespace diffmas
