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

  /// Which lanes' queries see `column`, and which lanes' columns a query at `position` sees.
  auto see(const Mask& mask, int j, int64_t column) const {
    return within(j, mask.first_seeing(column), mask.end_seeing(column));
  }
  auto seen(const Mask& mask, int j, int64_t position) const {
    return within(j, mask.first_seen(position), mask.end_seen(position));
  }

 private:
  auto within(int j, int64_t begin, int64_t end) const {
    return (vectors[j] >= static_cast<Integer>(begin)) & (vectors[j] < static_cast<Integer>(end));
  }
};

/// What stands between a scaled product and the softmax: nothing.
struct Uncapped {
  template <class V>
  V score(V s) const {
    return s;
  }
  /// The gradient of the scaled product, given that of its `score`.
  template <class V>
  V gradient(V, V grad) const {
    return grad;
  }
};

/// cap tanh(s / cap).
template <class T>
struct SoftCap {
  T cap, inverse;

  explicit SoftCap(T cap) : cap(cap), inverse(1 / cap) {}

  Vec<T> score(Vec<T> s) const { return hyperbolic_tangent(s * inverse) * cap; }
  Vec<T> gradient(Vec<T> score, Vec<T> grad) const {
    const Vec<T> t = score * inverse, square = t * t;
    // A masked score is infinite; times its probability, 0, it must not become NaN.
    return grad * (T(1) - (square > T(1) ? splat(T(1)) : square));
  }
};

/// f(Uncapped()) or f(SoftCap(softcap)), so that a loop that has no cap does not ask for it.
template <class T, class F>
inline void with_cap(T softcap, const F& f) {
  if (softcap > 0)
    f(SoftCap<T>(softcap));
  else
    f(Uncapped());
}

/// Caps `count` scores in place; there is room up to padded(count).
template <class T>
inline void cap_scores(T* scores, int64_t count, T softcap) {
  if (softcap <= 0) return;
  const SoftCap<T> cap(softcap);
  for (int64_t i = 0; i < count; i += W<T>) store(scores + i, cap.score(load(scores + i)));
}

}  // namespace DIFFMAS_ISA
}  // namespace diffmas

#define DIFFMAS_FOR_STORAGE_TYPES(instantiate) \
  instantiate(float) instantiate(double) instantiate(::diffmas::BFloat16) instantiate(::diffmas::Half)
