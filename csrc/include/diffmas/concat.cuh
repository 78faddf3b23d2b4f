// kv_concat and its backward: all layers, heads, rows and senders in one launch, K and V together, keys rotated on the
// way.
#pragma once

#include "diffmas/element_pair.cuh"

namespace diffmas {

/// Senders of one launch: as many as fit into a kernel's parameters.
constexpr int MAX_SENDERS = 32;
constexpr int CONCAT_THREADS = 256, CONCAT_COLUMNS = 32;

/// Keys or values of all layers [layers, batch, kv heads, capacity, dim].
template <class T>
struct Layers {
  Trace<T> first;
  int64_t layer_stride;

  DIFFMAS_HD T* at(int64_t layer, int64_t row, int64_t head, int64_t column) const {
    return first.at(row, head, column) + layer * layer_stride;
  }
};

/// Segment s = sender * batch + row is columns source_begin[s]… of the sender's row, and dest_begin[s]… of the row of
/// the whole. P is the senders' element type, W that of the whole.
template <class P, class W>
struct ConcatArguments {
  Layers<P> part_keys[MAX_SENDERS], part_values[MAX_SENDERS];
  /// Backward: the senders, as bits, whose accumulators are the same.
  uint32_t same[MAX_SENDERS];
  Layers<W> keys, values;
  const int32_t *source_begin, *counts, *dest_begin;
  const Acc<W>*cos, *sin;  // [segments, half], or null
  int senders, batch, layers, heads, dim, half;
  bool interleaved;
};

/// starts[s] = columns of all segments before s, for 0 <= s <= segments, by the first warp.
__device__ __forceinline__ void prefix_sums(int* starts, const int32_t* counts, int segments) {
  const int lane = threadIdx.x;
  if (lane >= 32) return;
  int before = 0;
  for (int first = 0; first < segments; first += 32) {
    int through = first + lane < segments ? counts[first + lane] : 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(ALL_LANES, through, offset);
      if (lane >= offset) through += other;
    }
    if (first + lane < segments) starts[first + lane + 1] = before + through;
    before += __shfl_sync(ALL_LANES, through, 31);
  }
  if (lane == 0) starts[0] = 0;
}

template <int N, class P, class W>
__device__ __forceinline__ void concat_pair(
    const ConcatArguments<P, W>& a, int layer, int head, int segment, int offset, int p) {
  const int sender = segment / a.batch, row = segment % a.batch;
  const int source = a.source_begin[segment] + offset, dest = a.dest_begin[segment] + offset;
  ElementPair<Acc<W>, N> key(p, a.half, a.interleaved), value = key;
  key.load(a.part_keys[sender].at(layer, row, head, source), a.dim);
  value.load(a.part_values[sender].at(layer, row, head, source), a.dim);
  if (a.cos != nullptr)
    key.rotate(a.cos + int64_t(segment) * a.half, a.sin + int64_t(segment) * a.half, 1, a.half, a.interleaved);
  key.store(a.keys.at(layer, row, head, dest), a.dim);
  value.store(a.values.at(layer, row, head, dest), a.dim);
}

/// Segments of one sender's accumulators may overlap. The first one with a column adds what all of them owe to it, in
/// their order; the others leave it.
template <int N, class P, class W>
__device__ __forceinline__ void concat_pair_backward(
    const ConcatArguments<P, W>& a, int layer, int head, int segment, int offset, int p) {
  const int sender = segment / a.batch, row = segment % a.batch;
  const int source = a.source_begin[segment] + offset;
  const auto holds = [&](int other) {
    const int s = other * a.batch + row;
    return a.source_begin[s] <= source && source < a.source_begin[s] + a.counts[s];
  };
  const uint32_t same = a.same[sender];
  for (int other = 0; other < sender; ++other)
    if ((same >> other & 1) && holds(other)) return;

  ElementPair<Acc<W>, N> key(p, a.half, a.interleaved), value = key, grad = key;
  P* to_key = a.part_keys[sender].at(layer, row, head, source);
  P* to_value = a.part_values[sender].at(layer, row, head, source);
  key.load(to_key, a.dim);
  value.load(to_value, a.dim);
  for (int other = sender; other < a.senders; ++other) {
    if (other > sender && !((same >> other & 1) && holds(other))) continue;
    const int64_t s = int64_t(other) * a.batch + row;
    const int dest = a.dest_begin[s] + source - a.source_begin[s];
    grad.load(a.keys.at(layer, row, head, dest), a.dim);
    if (a.cos != nullptr) grad.rotate(a.cos + s * a.half, a.sin + s * a.half, -1, a.half, a.interleaved);
    key.add(grad);
    grad.load(a.values.at(layer, row, head, dest), a.dim);
    value.add(grad);
    if (same >> other < 2) break;
  }
  key.store(to_key, a.dim);
  value.store(to_value, a.dim);
}

/// Any grid: blocks draw tiles of CONCAT_COLUMNS columns in turn, over the columns that exist, counted on the device.
/// Dynamic shared memory: segments + 1 integers. N elements move as one vector; `pairs` is how many pairs cover a head.
template <class P, class W, int N, bool BACKWARD>
__global__ void __launch_bounds__(CONCAT_THREADS)
    concat_kernel(const __grid_constant__ ConcatArguments<P, W> a, int pairs) {
  DIFFMAS_SHARED(int, first_start);
  int* starts = &first_start;
  const int segments = a.senders * a.batch;
  prefix_sums(starts, a.counts, segments);
  __syncthreads();
  const int total = starts[segments];
  const int64_t tiles = divide_up(total, CONCAT_COLUMNS);
  for (int64_t unit = blockIdx.x; unit < tiles * a.heads * a.layers; unit += gridDim.x) {
    const int64_t plane = unit / tiles;
    const int first = static_cast<int>(unit % tiles) * CONCAT_COLUMNS;
    const int head = static_cast<int>(plane % a.heads), layer = static_cast<int>(plane / a.heads);
    for (int i = threadIdx.x; i < CONCAT_COLUMNS * pairs; i += CONCAT_THREADS) {
      const int column = first + i / pairs;
      if (column >= total) break;
      int segment = 0;  // the last one that starts at or before `column`, which is not empty then
      for (int low = 0, high = segments; high - low > 1;) {
        const int middle = (low + high) / 2;
        (starts[middle] <= column ? low : high) = middle;
        segment = low;
      }
      if constexpr (BACKWARD)
        concat_pair_backward<N>(a, layer, head, segment, column - starts[segment], i % pairs);
      else
        concat_pair<N>(a, layer, head, segment, column - starts[segment], i % pairs);
    }
  }
}

}  // namespace diffmas
