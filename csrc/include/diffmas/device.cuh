// What the kernels share below the level of an algorithm: number types, warp reductions, asynchronous copies, and the
// tensor-core instructions on their documented fragment layouts (PTX ISA: mma.m16n8k16, ldmatrix).
// Without nvcc, the host check (tests/cuda_host/shim.h) stands in for what is written for the GPU here.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "diffmas/offsets.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

/// Declares `name`, a reference to the block's dynamic shared memory.
#define DIFFMAS_SHARED(Type, name)                                        \
  extern __shared__ __align__(128) unsigned char diffmas_shared_memory[]; \
  Type& name = *reinterpret_cast<Type*>(diffmas_shared_memory)

namespace diffmas {

using BFloat16 = __nv_bfloat16;
using Half = __half;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Copies BYTES (4 or 16) to shared memory in the background; zeros where not `valid`, and `source` is then not read.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* target, const void* source, bool valid) {
  const int size = valid ? BYTES : 0;
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
                 "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(target)), "l"(source), "n"(BYTES),
                 "r"(size) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits for all groups of this thread's copies but the latest N.
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/// Four 8x8 matrices of 16-bit elements, each transposed on the way where TRANSPOSED; lane l gives the address of row
/// l % 8 of matrix l / 8.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

/// c [16, 8] += a [16, 16] b [16, 8], accumulated in float32.
template <class T>
__device__ __forceinline__ void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exponential2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float x, BFloat16& y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(float x, Half& y) { y = __float2half_rn(x); }

/// Two elements in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, Half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

}  // namespace diffmas

#else
#include "shim.h"
#endif

namespace diffmas {

constexpr unsigned ALL_LANES = 0xffffffffu;

/// The type in which data stored as T is computed and accumulated.
template <class T>
struct AccumulationOf {
  using type = float;
};
template <>
struct AccumulationOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccumulationOf<T>::type;

template <class T>
__device__ __forceinline__ Acc<T> accurate(T x) {
  if constexpr (sizeof(T) == 2)
    return to_float(x);
  else
    return x;
}

template <class T, class A>
__device__ __forceinline__ T rounded(A x) {
  if constexpr (sizeof(T) == 2) {
    T y;
    round_to(static_cast<float>(x), y);
    return y;
  } else {
    return static_cast<T>(x);
  }
}

/// N elements that move together.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T element[N];
};

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

template <class A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, offset));
  return x;
}

/// Reductions over the four lanes that hold one row of an accumulator fragment.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

/// Elements of a head that a lane holds, dims lane, lane + 32, …, of head dims up to 256.
constexpr int LANE_ELEMENTS = 8;

DIFFMAS_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Division by a number fixed at launch; exact while dividend * divisor < 2^32.
struct Divisor {
  uint32_t value;
  uint64_t reciprocal;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor), reciprocal(((uint64_t(1) << 32) + divisor - 1) / divisor) {}

  DIFFMAS_HD uint32_t quotient(uint32_t x) const { return static_cast<uint32_t>((x * reciprocal) >> 32); }
  DIFFMAS_HD uint32_t remainder(uint32_t x) const { return x - quotient(x) * value; }
};

}  // namespace diffmas
