// Rows of stored data as tiles of the accumulation type.
#pragma once

#include "cpu/kernels/simd.h"

namespace diffmas {
namespace DIFFMAS_ISA {

template <class T>
inline int64_t padded(int64_t dim) {
  return (dim + W<T> - 1) / W<T> * W<T>;
}

/// target[0 .. padded(dim)) = factor * source[0 .. dim), zero beyond.
template <class S>
inline void read_row(Acc<S>* target, const S* source, int64_t dim, Acc<S> factor = 1) {
  using T = Acc<S>;
  int64_t d = 0;
  for (; d + W<T> <= dim; d += W<T>) store(target + d, load(source + d) * factor);
  if (d < dim) store(target + d, load_partial(source + d, dim - d) * factor);
}

/// target[0 .. dim) = factor * source[0 .. dim); source is readable up to padded(dim).
template <class S>
inline void write_row(S* target, const Acc<S>* source, int64_t dim, Acc<S> factor = 1) {
  using T = Acc<S>;
  int64_t d = 0;
  for (; d + W<T> <= dim; d += W<T>) store(target + d, load(source + d) * factor);
  if (d < dim) store_partial(target + d, load(source + d) * factor, dim - d);
}

template <class T>
struct Tile {
  const T* data;
  int64_t stride;
};

template <class S>
inline Tile<Acc<S>> converted(const S* source, int64_t stride, int64_t count, int64_t dim, Acc<S>* scratch) {
  const int64_t target_stride = padded<Acc<S>>(dim);
  for (int64_t i = 0; i < count; ++i) read_row(scratch + i * target_stride, source + i * stride, dim);
  return {scratch, target_stride};
}

/// `count` rows of `dim` elements: in place where they already have the type, otherwise converted into `scratch`
/// [count, padded(dim)].
template <class S>
inline Tile<Acc<S>> as_tile(const S* source, int64_t stride, int64_t count, int64_t dim, Acc<S>* scratch) {
  if constexpr (std::is_same_v<S, Acc<S>>) {
    return {source, stride};
  } else {
    return converted(source, stride, count, dim, scratch);
  }
}

/// Calls f(rows, stride) with rows that are readable in whole vectors, zero beyond `dim`: in place, as stored, where
/// `dim` fills vectors, otherwise converted into `scratch` [count, padded(dim)].
template <class S, class F>
inline void in_vectors(const S* source, int64_t stride, int64_t count, int64_t dim, Acc<S>* scratch, const F& f) {
  if (dim % W<Acc<S>> == 0) {
    f(source, stride);
  } else {
    const Tile<Acc<S>> tile = converted(source, stride, count, dim, scratch);
    f(tile.data, tile.stride);
  }
}

}  // namespace DIFFMAS_ISA
}  // namespace diffmas
