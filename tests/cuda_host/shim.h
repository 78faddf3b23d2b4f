// Runs the kernels of csrc/include/diffmas/*.cuh, and the launchers of csrc/cuda, on the CPU. A block's threads are
// fibers that take turns at barriers and warp-wide instructions, in an order that DIFFMAS_HOST_SEED permutes, as it
// does the blocks'. Tensor-core and matrix-load instructions work on the documented fragment layouts lane by lane;
// asynchronous copies land when they are waited for, and not before; shared memory starts as NaN. What goes wrong
// aborts with a message.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(unsigned(x)), y(unsigned(y)), z(unsigned(z)) {}
};
struct alignas(16) int4 {
  int v[4];
};
struct alignas(8) int2 {
  int v[2];
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace diffmas {

using std::exp;
using std::log;
using std::max;
using std::min;
using std::sqrt;
using std::tanh;

[[noreturn]] inline void host_failure(const std::string& what) {
  std::fprintf(
      stderr, "host check: %s (block %u %u %u, thread %u)\n", what.c_str(), blockIdx.x, blockIdx.y, blockIdx.z,
      threadIdx.x);
  std::abort();
}

/// One block at a time.
class HostBlock {
 public:
  static constexpr size_t SHARED_SIZE = 163 * 1024, STACK = 256 * 1024, GUARD = 4096;

  /// What compute capability 8.0 grants a block; 8.6 and 8.9 have less.
  static size_t shared_limit() {
    const char* limit = std::getenv("DIFFMAS_HOST_SHARED_LIMIT");
    return limit ? std::atoi(limit) : SHARED_SIZE;
  }

  static HostBlock& instance() {
    static HostBlock block;
    return block;
  }

  unsigned char* shared() { return shared_; }

  void run(size_t shared_size, const std::function<void()>& kernel, std::mt19937& random) {
    if (shared_size > shared_limit()) host_failure(std::to_string(shared_size) + " bytes of shared memory");
    std::memset(shared_, 0xff, shared_size);
    std::memset(shared_ + shared_size, 0x5a, GUARD);
    kernel_ = &kernel;
    const int threads = int(blockDim.x);
    while (int(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    warps_.assign((threads + 31) / 32, {});
    arrived_ = generation_ = 0;
    live_ = threads;
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<int> warp_order(warps_.size());
    std::iota(warp_order.begin(), warp_order.end(), 0);
    std::shuffle(warp_order.begin(), warp_order.end(), random);
    for (int t = 0; t < threads; ++t) fibers_[t]->start(t);
    // A warp runs until it can get no further before the next one starts: as far apart as warps can be.
    for (bool any = true; live_ > 0;) {
      if (!any) host_failure("threads wait for each other for ever");
      any = false;
      for (int warp : warp_order) {
        do {
          progress_ = false;
          for (int t : order)
            if (t / 32 == warp && !fibers_[t]->done) resume(t);
          any |= progress_;
        } while (progress_);
      }
    }
    for (size_t i = 0; i < GUARD; ++i)
      if (shared_[shared_size + i] != 0x5a) host_failure("a write behind the block's shared memory");
  }

  void barrier() {
    const unsigned before = generation_;
    progress_ = true;
    if (++arrived_ >= live_) {
      release_barrier();
      return;
    }
    while (generation_ == before) yield();
  }

  /// Every lane's `mine`, once all 32 lanes of the warp have come here with the same instruction.
  template <class T>
  const T* exchange(const char* instruction, const T& mine) {
    static_assert(sizeof(T) <= Warp::SIZE);
    Warp& warp = warps_[threadIdx.x / 32];
    const unsigned before = warp.generation, lane = threadIdx.x % 32;
    T* values = reinterpret_cast<T*>(warp.values[before % 2]);
    if (warp.arrived == 0) warp.instruction = instruction;
    if (std::strcmp(warp.instruction, instruction) != 0)
      host_failure(std::string("lanes of a warp meet in ") + instruction + " and " + warp.instruction);
    std::memcpy(values + lane, &mine, sizeof mine);
    progress_ = true;
    if (++warp.arrived == 32) {
      warp.arrived = 0;
      ++warp.generation;
    }
    while (warp.generation == before) yield();
    return values;
  }

  struct Copy {
    void* target;
    unsigned char bytes[16];
    int size, group;
  };
  void copy(void* target, const void* source, int size, bool valid) {
    const auto address = static_cast<unsigned char*>(target);
    if (address < shared_ || address + size > shared_ + SHARED_SIZE) host_failure("a copy outside of shared memory");
    if (reinterpret_cast<uintptr_t>(target) % size || (valid && reinterpret_cast<uintptr_t>(source) % size))
      host_failure("a misaligned copy");
    Copy copy{target, {}, size, current_->group};
    if (valid) std::memcpy(copy.bytes, source, size);
    std::memset(target, 0xff, size);
    current_->copies.push_back(copy);
  }
  void commit() { ++current_->group; }
  void wait(int groups) {
    auto& copies = current_->copies;
    size_t landed = 0;
    for (; landed < copies.size() && copies[landed].group < current_->group - groups; ++landed)
      std::memcpy(copies[landed].target, copies[landed].bytes, copies[landed].size);
    copies.erase(copies.begin(), copies.begin() + landed);
  }

 private:
  struct Warp {
    static constexpr int SIZE = 64;
    alignas(64) unsigned char values[2][32 * SIZE];
    const char* instruction = "";
    unsigned generation = 0;
    int arrived = 0;
  };

  struct Fiber {
    std::vector<unsigned char> stack = std::vector<unsigned char>(STACK);
    ucontext_t context;
    jmp_buf resumption;
    std::vector<Copy> copies;
    int group = 0;
    bool fresh = true, done = false;

    void start(int) {
      fresh = true;
      done = false;
      group = 0;
      copies.clear();
      getcontext(&context);
      context.uc_stack.ss_sp = stack.data();
      context.uc_stack.ss_size = stack.size();
      context.uc_link = nullptr;
      makecontext(&context, &HostBlock::enter, 0);
    }
    void resume() {
      if (!fresh) _longjmp(resumption, 1);
      fresh = false;
      setcontext(&context);
    }
  };

  static void enter() {
    HostBlock& block = instance();
    (*block.kernel_)();
    if (!block.current_->copies.empty()) host_failure("a thread ends before its copies");
    block.current_->done = true;
    block.progress_ = true;
    if (--block.live_ > 0 && block.arrived_ >= block.live_) block.release_barrier();
    _longjmp(block.scheduler_, 1);
  }

  void resume(int t) {
    current_ = fibers_[t].get();
    threadIdx = dim3(t, 0, 0);
    if (_setjmp(scheduler_) == 0) current_->resume();
  }

  void release_barrier() {
    arrived_ = 0;
    ++generation_;
  }

  void yield() {
    Fiber* const self = current_;
    if (_setjmp(self->resumption) == 0) _longjmp(scheduler_, 1);
  }

  alignas(128) unsigned char shared_[SHARED_SIZE + GUARD];
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  const std::function<void()>* kernel_ = nullptr;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  unsigned generation_ = 0;
  int arrived_ = 0, live_ = 0;
  bool progress_ = false;
};

/// All blocks of a grid, one after the other.
template <class... Parameters, class... Arguments>
void host_launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments&&... arguments) {
  const char* seed = std::getenv("DIFFMAS_HOST_SEED");
  std::mt19937 random(seed ? std::atoi(seed) : 0);
  if (threads % 32 != 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535) host_failure("a grid no device accepts");
  std::vector<int64_t> order(int64_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  gridDim = grid;
  blockDim = dim3(threads);
  const std::function<void()> body = [&] { kernel(arguments...); };
  for (int64_t block : order) {
    blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    HostBlock::instance().run(shared, body, random);
  }
}

#define DIFFMAS_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(::diffmas::HostBlock::instance().shared())

inline void __syncthreads() { HostBlock::instance().barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int offset) {
  const int other = int(threadIdx.x % 32) ^ offset;
  return HostBlock::instance().exchange("shfl.xor", x)[other];
}
template <class T>
T __shfl_up_sync(unsigned, T x, int offset) {
  const int lane = threadIdx.x % 32;
  return HostBlock::instance().exchange("shfl.up", x)[lane < offset ? lane : lane - offset];
}
template <class T>
T __shfl_sync(unsigned, T x, int source) {
  return HostBlock::instance().exchange("shfl", x)[source];
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const bool* all = HostBlock::instance().exchange("ballot", predicate);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(all[lane]) << lane;
  return bits;
}
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* counter, unsigned last) {
  const unsigned before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  _Float16 value;
};
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline float to_float(Half x) { return float(x.value); }
inline void round_to(float x, BFloat16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // To nearest, ties to even; a NaN stays one.
  y.bits = std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void round_to(float x, Half& y) { y.value = _Float16(x); }

template <class T>
uint32_t pack(float low, float high) {
  T pair[2];
  round_to(low, pair[0]);
  round_to(high, pair[1]);
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits;
}
/// Element 0 or 1 of a register.
template <class T>
float element(uint32_t bits, int index) {
  T pair[2];
  std::memcpy(pair, &bits, sizeof bits);
  return to_float(pair[index]);
}

inline float exponential2(float x) { return std::exp2(x); }

template <int BYTES>
void copy_async(void* target, const void* source, bool valid) {
  HostBlock::instance().copy(target, source, BYTES, valid);
}
inline void commit_copies() { HostBlock::instance().commit(); }
template <int N>
void wait_copies() {
  HostBlock::instance().wait(N);
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) host_failure("a misaligned matrix row");
  const int lane = threadIdx.x % 32;
  const auto rows = HostBlock::instance().exchange("ldmatrix", row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int r = TRANSPOSED ? lane % 4 * 2 + i : lane / 4, c = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
      pair[i] = static_cast<const uint16_t*>(rows[matrix * 8 + r])[c];
    }
    std::memcpy(&r[matrix], pair, 4);
  }
}

template <class T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto all = HostBlock::instance().exchange("mma", Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float left = element<T>(all[row % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + row / 8], k % 2);
      const float right = element<T>(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
      c[i] += left * right;
    }
  }
}

}  // namespace diffmas
