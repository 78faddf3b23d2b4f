// Rotary embedding of one head's elements, as the kernels move them.
#pragma once

#include "diffmas/device.cuh"

namespace diffmas {

/// Two vectors of N neighbouring elements of one head that are read together because elements of one turn with elements
/// of the other. Half-split: dims p N… and half + p N…; interleaved, and beyond the rotated dims: 2 N neighbours.
template <class A, int N>
struct ElementPair {
  int low, high, angle;
  A x[2 * N];

  __device__ __forceinline__ ElementPair(int p, int half, bool interleaved) : angle(p * N) {
    const bool split = p * N < half && !interleaved;
    low = split ? p * N : 2 * p * N;
    high = split ? half + p * N : low + N;
  }

  template <class T>
  __device__ __forceinline__ void load(const T* head, int dim) {
    const auto a = *reinterpret_cast<const Vector<T, N>*>(head + low);
    auto b = a;
    if (N > 1 || high < dim) b = *reinterpret_cast<const Vector<T, N>*>(head + high);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = accurate(a.element[i]);
      x[N + i] = accurate(b.element[i]);
    }
  }

  template <class T>
  __device__ __forceinline__ void store(T* head, int dim) const {
    Vector<T, N> a, b;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      a.element[i] = rounded<T>(x[i]);
      b.element[i] = rounded<T>(x[N + i]);
    }
    *reinterpret_cast<Vector<T, N>*>(head + low) = a;
    if (N > 1 || high < dim) *reinterpret_cast<Vector<T, N>*>(head + high) = b;
  }

  /// Turns by the angles whose cosines and sines are given, the latter times `direction`.
  template <class C>
  __device__ __forceinline__ void rotate(const C* cos, const C* sin, A direction, int half, bool interleaved) {
    if (angle >= half) return;
    const auto c = *reinterpret_cast<const Vector<C, N>*>(cos + angle);
    const auto s = *reinterpret_cast<const Vector<C, N>*>(sin + angle);
    const auto turn = [&](A& a, A& b, int i) {
      const A cosine = accurate(c.element[i]), sine = accurate(s.element[i]) * direction, first = a;
      a = first * cosine - b * sine;
      b = b * cosine + first * sine;
    };
#pragma unroll
    for (int i = 0; i < N; ++i) interleaved ? turn(x[2 * i], x[2 * i + 1], i) : turn(x[i], x[N + i], i);
  }

  __device__ __forceinline__ void add(const ElementPair& other) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) x[i] += other.x[i];
  }
};

}  // namespace diffmas
