// Pieces the attention kernels share.
//
// A panel is NV vectors of query rows (or of columns) side by side: element (i, lane) of a panel-shaped buffer is at
// i * NV * W + lane. Softmax statistics are then plain vertical vector arithmetic, and the trace (or the queries) is
// read in place, one broadcast element at a time.
#pragma once

#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"

namespace diffmas {
namespace DIFFMAS_ISA {

/// Hands out consecutive pieces of a scratch buffer.
template <class T>
class Pieces {
 public:
  explicit Pieces(T* begin) : next_(begin) {}

  T* take(int64_t count) {
    T* piece = next_;
    next_ += (count + PADDING - 1) / PADDING * PADDING;
    return piece;
  }

 private:
  T* next_;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
constexpr T infinity() {
  return T(__builtin_huge_val());
}

/// Token and query head of a tile's query row, and its position.
struct QueryRow {
  int64_t token, head, position;
};

template <class S, class TileT>
inline QueryRow query_row(const AttentionInputs<S>& in, const TileT& tile, int64_t row) {
  const int64_t i = row / in.group;
  return {in.rows.token(tile.row, i), tile.head * in.group + row % in.group, in.rows.position(tile.row, i)};
}

/// panel[d][lane] = row[d].
template <int NV, class T>
inline void scatter_lane(T* panel, int64_t lane, const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) panel[d * NV * W<T> + lane] = row[d];
}

template <int NV, class T>
inline void gather_lane(T* row, const T* panel, int64_t lane, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) row[d] = panel[d * NV * W<T> + lane];
}

template <class T>
inline void fill(T* data, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) data[i] = value;
}

/// sum of x[d] * y[d] over d < dim; both zero beyond, up to a multiple of W.
template <class T>
inline T dot(const T* x, const T* y, int64_t dim) {
  Vec<T> total{};
  for (int64_t d = 0; d < dim; d += W<T>) total += load(x + d) * load(y + d);
  return sum<T>(total);
}

/// The positions of a panel's lanes, as vectors: of queries that meet one column, or of columns that meet one query.
template <int NV, class T>
struct LanePositions {
  using Integer = typename Lanes<T>::Integer;
  typename Lanes<T>::IntegerVec vectors[NV];
  int64_t lowest, highest;

  void set(int64_t lane, int64_t position) { vectors[lane / W<T>][lane % W<T>] = static_cast<Integer>(position); }

  /// Mask::sees, of all lanes at once.
  auto see(const Mask& mask, int j, int64_t column) const {
    const auto at = static_cast<Integer>(column), window = static_cast<Integer>(mask.window);
    return (vectors[j] >= at) & (vectors[j] - at < window);
  }
  auto seen(const Mask& mask, int j, int64_t position) const {
    const auto at = static_cast<Integer>(position), window = static_cast<Integer>(mask.window);
    return (vectors[j] <= at) & (at - vectors[j] < window);
  }
};

}  // namespace DIFFMAS_ISA
}  // namespace diffmas

#define DIFFMAS_FOR_STORAGE_TYPES(instantiate) \
  instantiate(float) instantiate(double) instantiate(::diffmas::BFloat16) instantiate(::diffmas::Half)
