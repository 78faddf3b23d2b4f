// Work distribution of the CPU launchers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include <torch/csrc/stable/ops.h>

namespace diffmas {

/// Work (elements moved or multiplied) that is worth waking another thread for.
constexpr int64_t WORK_PER_THREAD = 1 << 17;

/// Calls run(task, own) for 0 <= own < threads, the calling thread's with 0. Threads that are not there by the time the
/// calling one has returned from its own call are not waited for: whatever runs has to do the others' work.
void on_threads(int64_t threads, void (*run)(const void* task, int64_t own), const void* task);

/// Runs task(i) for 0 <= i < count on as many threads as torch has. Every thread begins with a stretch of its own, since
/// neighbouring tasks tend to read neighbouring memory, and helps others when it is done: tasks may differ in cost.
/// Results must not depend on which thread runs a task. `work`: all tasks' together.
template <class Task>
void parallel_tasks(int64_t count, int64_t work, const Task& task) {
  const int64_t useful = std::min(count, work / WORK_PER_THREAD);
  const int64_t threads = useful < 2 ? 1 : std::min<int64_t>(useful, torch::stable::get_num_threads());
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Stretch> stretches(threads);
  for (int64_t t = 0; t < threads; ++t) {
    stretches[t].next = t * count / threads;
    stretches[t].end = (t + 1) * count / threads;
  }
  const auto run = [&](int64_t own) {
    for (int64_t t = 0; t < threads; ++t) {
      Stretch& stretch = stretches[(own + t) % threads];
      for (int64_t i = stretch.next++; i < stretch.end; i = stretch.next++) task(i);
    }
  };
  using Run = decltype(run);
  on_threads(threads, [](const void* f, int64_t own) { (*static_cast<const Run*>(f))(own); }, &run);
}

/// Uninitialised memory, aligned for every instruction set's vectors.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : capacity_(count) {
    if (count > 0) memory_.reset(static_cast<T*>(::operator new(sizeof(T) * count, ALIGNMENT)));
  }

  T* data() { return memory_.get(); }
  int64_t capacity() const { return capacity_; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};

  struct Delete {
    void operator()(T* memory) const { ::operator delete(memory, ALIGNMENT); }
  };

  int64_t capacity_;
  std::unique_ptr<T, Delete> memory_;
};

/// This thread's scratch memory, kept from call to call.
template <class T>
T* scratch(int64_t count) {
  thread_local Buffer<T> buffer;
  if (buffer.capacity() < count) buffer = Buffer<T>(count);
  return buffer.data();
}

}  // namespace diffmas
