// The part of a single-token call's backward that is not dQ: it puts the call's queries on the pending list and reads
// out the gradient of the call's own key and value.
#pragma once

#include "diffmas/attention.cuh"

namespace diffmas {

template <class T>
struct OwnColumnArguments {
  Packed<const T> q, grad_out, out;
  Packed<const Acc<T>> lse;
  Trace<const T> keys, values;
  Trace<const Acc<T>> grad_keys, grad_values;
  // [batch, slots, heads(, dim)]; a trace's head and column are here the pending slot and the query head. Slot p of a
  // row stands at pending_starts + p.
  Trace<T> pending_q, pending_grad;
  Trace<Acc<T>> pending_lse, pending_delta;
  Packed<T> grad_k, grad_v;
  RowRanges rows;
  const int32_t* pending_starts;
  int slots, group, dim;
  int blocks;  // batch rows to handle in grid z behind the other work, in the slots that short chunks leave; 0: none
  Acc<T> scale;
  SoftCap<Acc<T>> softcap;
  Mask mask;

  /// The batch row whose own column this block handles, or a negative number.
  __device__ __forceinline__ int row_of_block() const { return static_cast<int>(blockIdx.z + blocks - gridDim.z); }
};

template <class T>
__device__ __forceinline__ void load_lane(Acc<T> (&x)[LANE_ELEMENTS], const T* source, int dim) {
#pragma unroll
  for (int e = 0; e < LANE_ELEMENTS; ++e) {
    const int d = e * 32 + threadIdx.x % 32;
    x[e] = d < dim ? accurate(source[d]) : Acc<T>(0);
  }
}

template <class T, class A>
__device__ __forceinline__ void store_lane(T* target, const A (&x)[LANE_ELEMENTS], int dim) {
#pragma unroll
  for (int e = 0; e < LANE_ELEMENTS; ++e) {
    const int d = e * 32 + threadIdx.x % 32;
    if (d < dim) target[d] = rounded<T>(x[e]);
  }
}

template <class A>
__device__ __forceinline__ A lane_dot(const A (&x)[LANE_ELEMENTS], const A (&y)[LANE_ELEMENTS]) {
  A sum = 0;
#pragma unroll
  for (int e = 0; e < LANE_ELEMENTS; ++e) sum += x[e] * y[e];
  return warp_sum(sum);
}

/// One block for one (batch row, kv head). `shared` holds 2 * warps * dim numbers.
/// The contributions of (pending slot, query head) pairs are dealt out to the warps and added in a fixed order.
template <class T>
__device__ __forceinline__ void own_column(const OwnColumnArguments<T>& a, int row, int kv_head, Acc<T>* shared) {
  using A = Acc<T>;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, first_head = kv_head * a.group;
  if (a.rows.count(row) == 0) return;
  const int64_t token = a.rows.begin[row];
  const int column = a.rows.starts[row], own_slot = column - a.pending_starts[row];
  A key[LANE_ELEMENTS], value[LANE_ELEMENTS], grad_k[LANE_ELEMENTS] = {}, grad_v[LANE_ELEMENTS] = {};
  load_lane(key, a.keys.at(row, kv_head, column), a.dim);
  load_lane(value, a.values.at(row, kv_head, column), a.dim);
  const auto add = [&](const A(&q)[LANE_ELEMENTS], const A(&grad)[LANE_ELEMENTS], A lse, A delta) {
    const A score = a.softcap.score(lane_dot(q, key) * a.scale), probability = exp(score - lse);
    const A grad_score = a.softcap.gradient(score, probability * (lane_dot(grad, value) - delta)) * a.scale;
#pragma unroll
    for (int e = 0; e < LANE_ELEMENTS; ++e) {
      grad_k[e] += grad_score * q[e];
      grad_v[e] += probability * grad[e];
    }
  };
  int pair = warp;
  for (; pair < a.group; pair += warps) {
    const int head = first_head + pair;
    A q[LANE_ELEMENTS], grad[LANE_ELEMENTS], out[LANE_ELEMENTS];
    load_lane(q, a.q.at(token, head), a.dim);
    load_lane(grad, a.grad_out.at(token, head), a.dim);
    load_lane(out, a.out.at(token, head), a.dim);
    const A lse = *a.lse.at(token, head), delta = lane_dot(out, grad);
    store_lane(a.pending_q.at(row, own_slot, head), q, a.dim);
    store_lane(a.pending_grad.at(row, own_slot, head), grad, a.dim);
    if (threadIdx.x % 32 == 0) {
      *a.pending_lse.at(row, own_slot, head) = lse;
      *a.pending_delta.at(row, own_slot, head) = delta;
    }
    add(q, grad, lse, delta);
  }
  // Nothing is stored in here, so that the loads of several pairs are under way at once.
  const int seeing = static_cast<int>(a.mask.end_seeing(column) - column);
  const int pairs = min(a.slots - own_slot, seeing) * a.group;
#pragma unroll 2
  for (; pair < pairs; pair += warps) {
    const int slot = own_slot + pair / a.group, head = first_head + pair % a.group;
    A q[LANE_ELEMENTS], grad[LANE_ELEMENTS];
    load_lane(q, a.pending_q.at(row, slot, head), a.dim);
    load_lane(grad, a.pending_grad.at(row, slot, head), a.dim);
    add(q, grad, *a.pending_lse.at(row, slot, head), *a.pending_delta.at(row, slot, head));
  }
  store_lane(shared + warp * a.dim, grad_k, a.dim);
  store_lane(shared + (warps + warp) * a.dim, grad_v, a.dim);
  __syncthreads();
  for (int d = threadIdx.x; d < a.dim; d += blockDim.x) {
    A k = a.grad_keys.at(row, kv_head, column)[d], v = a.grad_values.at(row, kv_head, column)[d];
    for (int w = 0; w < warps; ++w) {
      k += shared[w * a.dim + d];
      v += shared[(warps + w) * a.dim + d];
    }
    a.grad_k.at(token, kv_head)[d] = rounded<T>(k);
    a.grad_v.at(token, kv_head)[d] = rounded<T>(v);
  }
}

}  // namespace diffmas
