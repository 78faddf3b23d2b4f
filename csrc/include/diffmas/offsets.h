// All address arithmetic of the kernels, CPU and CUDA, in 64 bits. Strides count elements; the last one is 1.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DIFFMAS_HD __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels compile this header for several instruction sets, and an out-of-line copy of one
// could be linked into another.
#define DIFFMAS_HD inline __attribute__((always_inline))
#endif

namespace diffmas {

/// Packed tokens [T, heads, dim].
template <class T>
struct Packed {
  T* data;
  int64_t token_stride, head_stride;

  DIFFMAS_HD T* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

/// One layer of a trace [B, heads, capacity, dim].
template <class T>
struct Trace {
  T* data;
  int64_t row_stride, head_stride, column_stride;

  DIFFMAS_HD T* at(int64_t row, int64_t head, int64_t column) const {
    return data + row * row_stride + head * head_stride + column * column_stride;
  }
};

/// Token begin[b] + i of row b is at trace column starts[b] + i, for 0 <= i < end[b] - begin[b].
struct RowRanges {
  const int32_t *begin, *end, *starts;

  DIFFMAS_HD int64_t count(int64_t row) const { return int64_t(end[row]) - begin[row]; }
  DIFFMAS_HD int64_t token(int64_t row, int64_t i) const { return int64_t(begin[row]) + i; }
  DIFFMAS_HD int64_t position(int64_t row, int64_t i) const { return int64_t(starts[row]) + i; }
};

}  // namespace diffmas
