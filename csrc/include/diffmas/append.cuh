// kv_append on raw pointers.
#pragma once

#include "diffmas/offsets.h"

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
    keys.at(row, head, column)[element] = k.at(source, head)[element];
    values.at(row, head, column)[element] = v.at(source, head)[element];
  }
}

}  // namespace diffmas
