// The CPU kernels on raw pointers, free of torch. Everything here exists once for each instruction set.
#pragma once

#include <cstdint>

#include "diffmas/mask.h"

namespace diffmas {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class S>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
/// Type in which data stored as S is computed and accumulated.
template <class S>
using Acc = typename AccumulationOf<S>::type;

/// Tiles have at most this many query rows or columns.
constexpr int64_t TILE = 128;
/// Up to this many query rows stream the trace once, without transposing anything.
constexpr int64_t NARROW = 8;
/// A narrow tile spans at most this many columns.
constexpr int64_t NARROW_COLUMNS = 512;
/// Columns or query rows of one step of a kernel's inner loop.
constexpr int64_t STEP = 64;
/// Padding that every instruction set's vectors divide.
constexpr int64_t PADDING = 16;

/// Elements of scratch memory that any attention kernel needs.
inline __attribute__((always_inline)) int64_t attention_scratch(int64_t dim) {
  return (5 * TILE + 2 * STEP) * (dim + PADDING) + 2 * NARROW * NARROW_COLUMNS + 8 * TILE + 2 * STEP * 2 * PADDING;
}

/// Query rows of one (row, kv head) pair are numbered token * group + query head within the group. A tile of them meets
/// the columns [column_begin, column_end); where a tile is split over its columns, each part writes a partial result.
struct QueryTile {
  int64_t row, head;
  int64_t first, last;
  int64_t column_begin, column_end;
  int64_t partial;  // where this part's partial rows begin, or -1 for an unsplit tile
};

/// A tile whose `splits` parts left `last - first` partial rows each, one part after the other from `partial` on.
struct SplitTile {
  int64_t row, head;
  int64_t first, last;
  int64_t partial, splits;
};

/// Columns [begin, end) of one (row, kv head) pair, against all its query rows.
struct ColumnTile {
  int64_t row, head;
  int64_t begin, end;
};

/// Columns [begin, end) of one (row, kv head) pair, whose part of the queries' gradients begins at row `partial`.
struct GradientTile {
  int64_t row, head;
  int64_t begin, end;
  int64_t partial;
};

template <class S>
struct AttentionInputs {
  Packed<const S> q;
  Trace<const S> keys, values;
  RowRanges rows;
  Mask mask;
  int64_t group, dim;
  Acc<S> scale, softcap;  // softcap is 0 where there is none
};

template <class S>
struct Attend : AttentionInputs<S> {
  Packed<S> out;
  Packed<Acc<S>> lse;
  Acc<S>* partial_out;  // [partial rows, dim]
  Acc<S>* partial_lse;  // [partial rows]
};

template <class S>
struct QueryGradient : AttentionInputs<S> {
  Packed<const S> grad_out, out;
  Packed<const Acc<S>> lse;
  Packed<S> grad_q;
  Packed<Acc<S>> delta;
  Acc<S>* partial;  // [partial rows, dim]
};

template <class S>
struct ColumnGradient : AttentionInputs<S> {
  Packed<const S> grad_out;
  Packed<const Acc<S>> lse, delta;
  Trace<Acc<S>> grad_keys, grad_values;
};

/// Gradients of queries, keys and values together; those of columns outside [column_begin, column_end) are left out.
template <class S>
struct AttentionGradient : ColumnGradient<S> {
  const int32_t *column_begin, *column_end;
  Acc<S>* partial;  // [partial rows, padded dim]
  Packed<S> grad_q;
};

/// The products of the rows of `out` and `grad_out`.
template <class S>
struct Deltas {
  Packed<const S> out, grad_out;
  Packed<Acc<S>> delta;
  int64_t heads, dim;
};

/// What `slots` pending tokens and the accumulators owe to one column of one kv head.
template <class S>
struct OwnColumn {
  Packed<const S> q, grad_out;      // (slot, query head of the group)
  Packed<const Acc<S>> lse, delta;  // the same
  int64_t slots, group, dim;
  Acc<S> scale, softcap;
  const S *key, *value;
  const Acc<S>*grad_key, *grad_value;
  S *grad_k, *grad_v;
};

/// One output row: sum over splits of exp(lse_s - lse) out_s.
template <class S, class Out>
struct MergeRow {
  const S* outs;
  int64_t out_stride;  // from split to split
  const Acc<S>* lses;
  int64_t lse_stride;
  int64_t splits, dim;
  Out* out;
  Acc<S>* lse;
};

/// Products y = x weight or x weightᵀ, summed over `size`. x is [rows, x_stride], y is [rows, y_stride], both zero
/// beyond their sizes.
template <class S>
struct Projection {
  const Acc<S>* x;
  Acc<S>* y;
  int64_t rows, size, x_stride, y_stride;
  const S* weight;
  int64_t weight_stride;
};

/// Scratch elements of the projections: a few rows of converted weight or a tile of outputs.
constexpr int64_t PROJECTION_ROWS = 32, PROJECTION_COLUMNS = 256;
/// Up to this many rows stream a weight by its rows; with more, a product that packs both factors first costs no more.
constexpr int64_t STREAMED_ROWS = 16;
/// Weight rows read side by side while streaming.
constexpr int64_t STREAMS = 8;
inline __attribute__((always_inline)) int64_t projection_scratch(int64_t stride) {
  return STREAMS * stride + 2 * PROJECTION_ROWS * PROJECTION_COLUMNS;
}

/// grad[size, size] = x[rows, size]ᵀ @ y[rows, size]; x and y are [rows, stride].
template <class T>
struct OuterProduct {
  const T *x, *y;
  T* grad;
  int64_t rows, size, stride;
};

/// `count` consecutive columns of one head, copied or (pairs > 0) rotated: pair d turns by cos[d], sign * sin[d].
/// With `add`, the result is added to the target.
template <class S, class T>
struct MoveColumns {
  const S* source;
  int64_t source_stride;
  T* target;
  int64_t target_stride;
  int64_t count, dim, pairs;
  const Acc<S>*cos, *sin;
  Acc<S> sign;
  bool interleaved, add;
};

/// Rows of [rows, dim] data, one after the other at their own strides.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;

  DIFFMAS_HD T* row(int64_t i) const { return data + i * stride; }
};

/// What normalises `dim` numbers together: y = (weight + offset) x / sqrt(mean(x^2) + epsilon).
template <class T>
struct RmsScale {
  const T* weight;
  int64_t dim;
  T offset, epsilon;
};

/// Rows that are normalised; `inverse` is one number a row, and may be null in the backward.
template <class T>
struct RmsNorm {
  Matrix<const T> x, grad, residual;  // grad and residual in the backward only
  Matrix<T> y;
  T* inverse;
  RmsScale<T> scale;
};

/// Heads [token, head, dim] that are normalised (where there is a weight), one by one or as many together as its size
/// says, and turned by their token's angles.
template <class T>
struct RotateHeads {
  Packed<const T> x, grad;  // grad in the backward only
  Packed<T> y;
  RmsScale<T> scale;
  Matrix<const T> cos, sin;
  int64_t heads, dim;
};

/// y = gate sigmoid(gate (slope + cubic gate^2)) up; in the backward `grad` is that of y.
template <class T>
struct GatedUnit {
  Matrix<const T> gate, up, grad;
  Matrix<T> y, grad_gate, grad_up;
  int64_t dim;
  T slope, cubic;
};

/// y[rows, columns] += bias + scaling x[rows, rank] b[rank, columns]; b may stand transposed, `[columns, rank]`.
template <class T>
struct LowRank {
  Matrix<T> y;
  Matrix<const T> x, b;
  const T* bias;  // or null
  int64_t rows, columns, rank;
  T scaling;
  bool transposed;
};

/// Terms of a dense product's sums that are added up together.
constexpr int64_t DENSE_DEPTH = 384;
inline __attribute__((always_inline)) int64_t dense_scratch(int64_t rows) {
  return 2 * DENSE_DEPTH * PADDING + (rows + 1) * PADDING;
}

/// c[rows, columns] = a b, or c += a b; a [rows, depth] and b [depth, columns] may stand transposed.
template <class T>
struct DenseProduct {
  T* c;
  const T *a, *b;
  int64_t c_stride, a_stride, b_stride;
  int64_t rows, columns, depth;
  bool a_transposed, b_transposed, add;
};

/// target[i][j] = scaling sum_n x[n][i] y[n][j], for few rows n: target is [height, width].
template <class T>
struct FewRowsOuter {
  Matrix<const T> x, y;
  Matrix<T> target;
  int64_t rows, height, width;
  T scaling;
};

/// An adapter's second product for few rows: y[rows, out] = bias + scaling low[rows, rank] b[out, rank]ᵀ.
template <class T>
struct FewRowsAdapter {
  Matrix<const T> low, b, grad;  // grad, of y, in the backward only
  const T* bias;                 // or null
  Matrix<T> y, grad_low, grad_b;
  int64_t rows, out, rank;
  T scaling;
};

/// Attention of `rows` rows x [rows, depth] over a vocabulary: keys [tokens, depth], values [tokens, width]. x and what
/// else is given by rows is zero beyond its size, up to whole vectors.
template <class S>
struct Vocabulary {
  Matrix<const Acc<S>> x;
  Matrix<const S> keys, values;
  const S* bias;  // or null
  int64_t rows, depth, width;
  Acc<S> scale, softcap, temperature;  // softcap is 0 where there is none
};

/// Of some of the tokens, by rows: their highest score, the sum of all scores' exponentials relative to it, and that of
/// the values weighted so. Not a log-sum-exp, whose rounding would become a relative error of the part.
template <class S>
struct ExpectedEmbedding : Vocabulary<S> {
  Acc<S>*out, *highest, *total;
  int64_t out_stride;
};

/// Of some of the tokens: the gradient of x, and each row's sum of scores times their gradients.
template <class S>
struct ExpectedEmbeddingGradient : Vocabulary<S> {
  Matrix<const Acc<S>> grad_out;
  const Acc<S>*lse, *delta;
  Acc<S>*grad_x, *grad_scores;
  int64_t grad_stride;
};

inline __attribute__((always_inline)) int64_t vocabulary_scratch(int64_t rows, int64_t stride) {
  return STEP * (stride + 2 * rows + 1) + 4 * PADDING;
}

#define DIFFMAS_DECLARE_KERNELS(isa)                                                                                  \
  namespace isa {                                                                                                     \
  template <class S>                                                                                                  \
  void attend(const Attend<S>&, const QueryTile&, Acc<S>* scratch);                                                   \
  template <class S>                                                                                                  \
  void query_gradient(const QueryGradient<S>&, const QueryTile&, Acc<S>* scratch);                                    \
  template <class S>                                                                                                  \
  void sum_partials(const QueryGradient<S>&, const SplitTile&, Acc<S>* scratch);                                      \
  template <class S>                                                                                                  \
  void column_gradient(const ColumnGradient<S>&, const ColumnTile&, Acc<S>* scratch);                                 \
  template <class S>                                                                                                  \
  void attention_gradient(const AttentionGradient<S>&, const GradientTile&, Acc<S>* scratch);                         \
  template <class S>                                                                                                  \
  void sum_query_gradients(const AttentionGradient<S>&, const SplitTile&, Acc<S>* scratch);                           \
  template <class S>                                                                                                  \
  void deltas(const Deltas<S>&, int64_t begin, int64_t end, Acc<S>* scratch);                                         \
  template <class S>                                                                                                  \
  void own_column(const OwnColumn<S>&, Acc<S>* scratch);                                                              \
  template <class S, class Out>                                                                                       \
  void merge_row(const MergeRow<S, Out>&, Acc<S>* scratch);                                                           \
  template <class S>                                                                                                  \
  void project(const Projection<S>&, int64_t begin, int64_t end, Acc<S>* scratch);                                    \
  template <class S>                                                                                                  \
  void project_streamed(const Projection<S>&, int64_t begin, int64_t end, int64_t width, Acc<S>* scratch);            \
  template <class S>                                                                                                  \
  void project_transposed(const Projection<S>&, int64_t begin, int64_t end, Acc<S>* scratch);                         \
  template <class T>                                                                                                  \
  void outer_product(const OuterProduct<T>&, int64_t begin, int64_t end, T* scratch);                                 \
  template <class S>                                                                                                  \
  void expected_embedding(const ExpectedEmbedding<S>&, int64_t begin, int64_t end, Acc<S>* scratch);                  \
  template <class S>                                                                                                  \
  void expected_embedding_gradient(const ExpectedEmbeddingGradient<S>&, int64_t begin, int64_t end, Acc<S>* scratch); \
  template <class S, class T>                                                                                         \
  void move_columns(const MoveColumns<S, T>&, Acc<S>* scratch);                                                       \
  template <class T>                                                                                                  \
  void rms_norm(const RmsNorm<T>&, int64_t begin, int64_t end);                                                       \
  template <class T>                                                                                                  \
  void rms_norm_gradient(const RmsNorm<T>&, int64_t begin, int64_t end);                                              \
  template <class T>                                                                                                  \
  void rotate_heads(const RotateHeads<T>&, int64_t begin, int64_t end, T* scratch);                                   \
  template <class T>                                                                                                  \
  void rotate_heads_gradient(const RotateHeads<T>&, int64_t begin, int64_t end, T* scratch);                          \
  template <class T>                                                                                                  \
  void gated_unit(const GatedUnit<T>&, int64_t begin, int64_t end);                                                   \
  template <class T>                                                                                                  \
  void gated_unit_gradient(const GatedUnit<T>&, int64_t begin, int64_t end);                                          \
  template <class T>                                                                                                  \
  void add_low_rank(const LowRank<T>&, int64_t begin, int64_t end, T* scratch);                                       \
  template <class T>                                                                                                  \
  void dense_product(const DenseProduct<T>&, T* scratch);                                                             \
  template <class T>                                                                                                  \
  void few_rows_outer(const FewRowsOuter<T>&);                                                                        \
  template <class T>                                                                                                  \
  void few_rows_adapter(const FewRowsAdapter<T>&, T* scratch);                                                        \
  template <class T>                                                                                                  \
  void few_rows_adapter_gradient(const FewRowsAdapter<T>&, T* scratch);                                               \
  }

DIFFMAS_DECLARE_KERNELS(baseline)
DIFFMAS_DECLARE_KERNELS(avx2)
DIFFMAS_DECLARE_KERNELS(avx512)

#undef DIFFMAS_DECLARE_KERNELS

}  // namespace diffmas
