// Takes the place of csrc/cuda/scope.h in the host check.
#pragma once

#include "arguments.h"
#include "diffmas/device.cuh"

namespace diffmas {

class LaunchScope {
 public:
  explicit LaunchScope(const Tensor&) {}

  int multiprocessors() const {
    const char* count = std::getenv("DIFFMAS_HOST_MULTIPROCESSORS");
    return count ? std::atoi(count) : 2;
  }

  int64_t shared_limit() const { return static_cast<int64_t>(HostBlock::shared_limit()); }

  int unused_slot(int) const { return std::getenv("DIFFMAS_HOST_NO_SLOTS") ? -1 : 0; }

  template <class... Parameters, class... Arguments>
  void launch(
      const char*, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
      Arguments&&... arguments) const {
    host_launch(kernel, grid, threads, shared, arguments...);
  }
};

}  // namespace diffmas
