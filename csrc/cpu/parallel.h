// Work distribution of the CPU launchers.
#pragma once

#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace diffmas {

/// Runs task(i) for 0 <= i < count on torch's threads. Threads draw the next task when they are done with one, so tasks
/// may differ in cost; results must not depend on which thread runs a task.
template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
  const int64_t threads = count < 2 ? 1 : torch::stable::get_num_threads();
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < count ? threads : count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

}  // namespace diffmas
