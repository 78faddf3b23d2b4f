// kv_append and kv_gather on raw pointers.
#pragma once

#include "diffmas/device.cuh"

namespace diffmas {

/// Grid: (tiles of APPEND_TOKENS new tokens, kv heads, rows). Elements move as vectors of type V; `width` counts them
/// per head dimension, and all strides count them too.
constexpr int APPEND_TOKENS = 16;

template <class V>
__global__ void append_kernel(
    Packed<const V> k, Packed<const V> v, Trace<V> keys, Trace<V> values, RowRanges rows, int width) {
  const int64_t row = blockIdx.z, head = blockIdx.y, first = int64_t(blockIdx.x) * APPEND_TOKENS;
  const int64_t remaining = rows.count(row) - first;
  const int tokens = remaining < APPEND_TOKENS ? int(remaining) : APPEND_TOKENS;
  for (int i = threadIdx.x; i < tokens * width; i += blockDim.x) {
    const int token = i / width, element = i % width;
    const int64_t source = rows.token(row, first + token), column = rows.position(row, first + token);
    // Both are under way before the first is stored: the compiler cannot know that they are not the same memory.
    const V key = k.at(source, head)[element], value = v.at(source, head)[element];
    keys.at(row, head, column)[element] = key;
    values.at(row, head, column)[element] = value;
  }
}

/// The row whose range holds `token`, or -1. All lanes of a warp call this together.
__device__ __forceinline__ int find_row(const RowRanges& rows, int batch, int64_t token) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < batch; first += 32) {
    const int b = first + lane;
    const unsigned hits = __ballot_sync(ALL_LANES, b < batch && rows.begin[b] <= token && token < rows.end[b]);
    if (hits != 0) return first + __ffs(hits) - 1;
  }
  return -1;
}

/// Grid: one block for each packed token. Elements move N at a time, `width` times per head, and change type on the
/// way.
template <class S, class T, int N>
__global__ void gather_kernel(
    Trace<const S> keys, Trace<const S> values, Packed<T> k, Packed<T> v, RowRanges rows, int batch, int heads,
    int width) {
  const int64_t token = blockIdx.x;
  const int row = find_row(rows, batch, token);
  const int64_t column = row < 0 ? 0 : int64_t(rows.starts[row]) + token - rows.begin[row];
  for (int i = threadIdx.x; i < heads * width; i += blockDim.x) {
    const int head = i / width, element = i % width * N;
    const auto read = [&](const Trace<const S>& from) {
      return row < 0 ? Vector<S, N>{} : *reinterpret_cast<const Vector<S, N>*>(from.at(row, head, column) + element);
    };
    const auto write = [&](const Packed<T>& to, const Vector<S, N>& x) {
      Vector<T, N> y;
#pragma unroll
      for (int e = 0; e < N; ++e) y.element[e] = rounded<T>(accurate(x.element[e]));
      *reinterpret_cast<Vector<T, N>*>(to.at(token, head) + element) = y;
    };
    const Vector<S, N> key = read(keys), value = read(values);
    write(k, key);
    write(v, value);
  }
}

}  // namespace diffmas
