// rotary_append and rotary_backward on raw pointers.
#pragma once

#include "diffmas/append.cuh"
#include "diffmas/element_pair.cuh"

namespace diffmas {

/// Cosines and sines of every token's turns, [tokens, half] each.
template <class C>
struct Turns {
  const C *cos, *sin;
  int64_t cos_stride, sin_stride;
  int half;
  bool interleaved;

  template <class A, int N>
  __device__ __forceinline__ void turn(ElementPair<A, N>& pair, int64_t token, A direction) const {
    pair.rotate(cos + token * cos_stride, sin + token * sin_stride, direction, half, interleaved);
  }
};

constexpr int ROTARY_THREADS = 128;

/// Grid: (packed tokens, tiles of ROTARY_THREADS pairs of all heads). Heads of q come first, then those of k and v, of
/// which the tokens that no row claims go nowhere. N elements move as one vector; `pairs` is how many cover a head.
template <class T, class C, int N>
__global__ void __launch_bounds__(ROTARY_THREADS) rotary_append_kernel(
    Packed<const T> q, Packed<const T> k, Packed<const T> v, Packed<T> out, Trace<T> keys, Trace<T> values,
    Turns<C> turns, RowRanges rows, int batch, int heads, int kv_heads, int dim, int pairs) {
  const int64_t token = blockIdx.x;
  const int row = find_row(rows, batch, token), i = blockIdx.y * ROTARY_THREADS + threadIdx.x, head = i / pairs;
  ElementPair<Acc<T>, N> pair(i % pairs, turns.half, turns.interleaved);
  if (head < heads) {
    pair.load(q.at(token, head), dim);
    turns.turn(pair, token, Acc<T>(1));
    pair.store(out.at(token, head), dim);
  } else if (head < heads + 2 * kv_heads && row >= 0) {
    const int64_t column = int64_t(rows.starts[row]) + token - rows.begin[row];
    const bool is_key = head < heads + kv_heads;
    const int kv_head = head - heads - (is_key ? 0 : kv_heads);
    pair.load((is_key ? k : v).at(token, kv_head), dim);
    if (is_key) turns.turn(pair, token, Acc<T>(1));
    pair.store((is_key ? keys : values).at(row, kv_head, column), dim);
  }
}

/// Grid: as above; heads of q come first, then those of k.
template <class T, class C, int N>
__global__ void __launch_bounds__(ROTARY_THREADS) rotary_backward_kernel(
    Packed<const T> grad_q, Packed<const T> grad_k, Packed<T> to_q, Packed<T> to_k, Turns<C> turns, int heads,
    int kv_heads, int dim, int pairs) {
  const int64_t token = blockIdx.x;
  const int i = blockIdx.y * ROTARY_THREADS + threadIdx.x, head = i / pairs;
  if (head >= heads + kv_heads) return;
  ElementPair<Acc<T>, N> pair(i % pairs, turns.half, turns.interleaved);
  const bool is_query = head < heads;
  const int own_head = is_query ? head : head - heads;
  pair.load((is_query ? grad_q : grad_k).at(token, own_head), dim);
  turns.turn(pair, token, Acc<T>(-1));
  pair.store((is_query ? to_q : to_k).at(token, own_head), dim);
}

}  // namespace diffmas
