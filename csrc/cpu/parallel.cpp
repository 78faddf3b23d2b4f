// Threads that share the work of one call. OpenMP's have to arrive at the end of every parallel region, and spin on the
// way there: on a machine whose cores are taken, each region then costs a time slice of the scheduler. These help where
// they get the chance to, and only a thread in the middle of a task is waited for.
#include "cpu/parallel.h"

#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <torch/csrc/stable/library.h>

namespace diffmas {

namespace {

void relax() {
#if defined(DIFFMAS_X86)
  __builtin_ia32_pause();
#endif
}

/// Spins until done() or for `time`, leaving the core to others that want it. Whether it is done.
template <class Done>
bool spin(std::chrono::microseconds time, const Done& done) {
  const auto until = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
    sched_yield();
  } while (std::chrono::steady_clock::now() < until);
  return done();
}

/// Keeps libraries that a task calls from starting threads of their own.
class OneThread {
 public:
  OneThread() {
    if (functions().mkl != nullptr) mkl_ = functions().mkl(1);
    if (functions().omp_get == nullptr) return;
    omp_ = functions().omp_get();
    functions().omp_set(1);
  }
  ~OneThread() {
    if (functions().mkl != nullptr) functions().mkl(mkl_);
    if (functions().omp_get != nullptr) functions().omp_set(omp_);
  }

 private:
  struct Functions {
    int (*mkl)(int) = nullptr;
    int (*omp_get)() = nullptr;
    void (*omp_set)(int) = nullptr;
  };

  static const Functions& functions() {
    static const Functions found = [] {
      Functions f;
      // What this library is linked with: torch's, and what torch's are linked with.
      Dl_info self{};
      dladdr(reinterpret_cast<void*>(&relax), &self);
      void* library = dlopen(self.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
      if (library == nullptr) return f;
      f.mkl = reinterpret_cast<int (*)(int)>(dlsym(library, "MKL_Set_Num_Threads_Local"));
      f.omp_get = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
      f.omp_set = reinterpret_cast<void (*)(int)>(dlsym(library, "omp_set_num_threads"));
      if (f.omp_set == nullptr) f.omp_get = nullptr;
      return f;
    }();
    return found;
  }

  int mkl_ = 0, omp_ = 0;
};

class Threads {
 public:
  /// How long a thread looks out for more work before it sleeps: about as long as a layer takes between two calls.
  static constexpr std::chrono::microseconds PATIENCE{500};

  /// False where another call has the threads.
  bool run(int64_t threads, void (*run)(const void*, int64_t), const void* task) {
    if (taken_.exchange(true)) return false;
    while (started_ < threads - 1) {
      try {
        std::thread([this, own = started_ + 1] { work(own); }).detach();
      } catch (const std::system_error&) {
        break;  // as many as the system allows
      }
      ++started_;
    }
    run_ = run, task_ = task, threads_ = threads, failure_ = nullptr;
    const uint64_t job = (state_.load(std::memory_order_relaxed) & ~OPEN) + NEXT;
    state_.store(job | OPEN);
    if (sleeping_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(sleep_);
      }
      wake_.notify_all();
    }
    attempt(0);
    state_.fetch_and(~OPEN);
    const auto left = [this] { return (state_.load(std::memory_order_acquire) & INSIDE) == 0; };
    while (!spin(PATIENCE, left)) {
    }
    const std::exception_ptr failure = failure_;
    taken_.store(false);
    if (failure) std::rethrow_exception(failure);
    return true;
  }

 private:
  /// `state_`: the number of threads inside the call, whether more may come in, and the call's number.
  static constexpr uint64_t INSIDE = 0xffff, OPEN = 1 << 16, NEXT = 1 << 17;

  void work(int64_t own) {
    const OneThread quiet;
    for (uint64_t done = 0;;) {
      uint64_t state = 0;
      const auto more = [&] {
        state = state_.load();
        return (state & OPEN) != 0 && state / NEXT != done;
      };
      if (!spin(PATIENCE, more)) {
        std::unique_lock<std::mutex> lock(sleep_);
        ++sleeping_;
        wake_.wait(lock, more);
        --sleeping_;
      }
      if (!state_.compare_exchange_weak(state, state + 1)) continue;
      done = state / NEXT;
      if (own < threads_) attempt(own);
      state_.fetch_sub(1, std::memory_order_release);
    }
  }

  void attempt(int64_t own) {
    try {
      run_(task_, own);
    } catch (...) {
      std::lock_guard<std::mutex> lock(failed_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  std::atomic<bool> taken_{false};
  std::mutex sleep_, failed_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int64_t> sleeping_{0};
  int64_t started_ = 0, threads_ = 0;
  void (*run_)(const void*, int64_t) = nullptr;
  const void* task_ = nullptr;
  std::exception_ptr failure_;
};

/// Never destroyed, since its threads may outlive every static object; a forked process, which has none of them, begins
/// anew.
Threads*& instance() {
  static Threads* threads = [] {
    pthread_atfork(nullptr, nullptr, [] { instance() = new Threads; });
    return new Threads;
  }();
  return threads;
}

std::atomic<bool> own_threads{false};

void use_own_threads(bool own) { own_threads = own; }

}  // namespace

void on_threads(int64_t threads, void (*run)(const void*, int64_t), const void* task) {
  if (!own_threads) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) { run(task, own); });
    return;
  }
  const OneThread quiet;
  if (!instance()->run(threads, run, task)) run(task, 0);  // another thread's call has them
}

}  // namespace diffmas

STABLE_TORCH_LIBRARY_FRAGMENT(diffmas, m) { m.def("use_own_threads(bool own) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(diffmas, CompositeExplicitAutograd, m) {
  m.impl("use_own_threads", TORCH_BOX(&diffmas::use_own_threads));
}
