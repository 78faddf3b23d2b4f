// The device and stream a launcher works on. The only part of the launchers that needs a GPU's driver.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"

namespace diffmas {

/// Makes `tensor`'s device the current one for its scope and holds that device's current stream.
class LaunchScope {
 public:
  explicit LaunchScope(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &handle));
    stream = static_cast<cudaStream_t>(handle);
  }

  int multiprocessors() const {
    int count = 0;
    check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }

  /// Most shared memory that a block can have, in bytes.
  int64_t shared_limit() const {
    int bytes = 0;
    check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    return bytes;
  }

  /// Launches `kernel` with `shared` bytes of dynamic shared memory; `name` is the operator's, for the error.
  template <class... Parameters, class... Arguments>
  void launch(
      const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
      Arguments&&... arguments) const {
    // The driver grants more than this only where asked to.
    if (shared > 48 * 1024) {
      STD_TORCH_CHECK(
          static_cast<int64_t>(shared) <= shared_limit(), name, " needs ", shared,
          " bytes of shared memory a block with this head dim and dtype; this device has ", shared_limit());
      check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
    kernel<<<grid, threads, shared, stream>>>(std::forward<Arguments>(arguments)...);
    check(name, cudaGetLastError());
  }

  /// One of `slots` sets of counters that no launch in flight at the same time as this one uses: a stream's launches,
  /// which follow each other, share one; a launch that a graph captures gets its own. -1 where all are taken.
  int unused_slot(int slots) const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check("cudaStreamIsCapturing", cudaStreamIsCapturing(stream, &status));
    static std::mutex mutex;
    static std::map<std::pair<int, cudaStream_t>, int> of_streams;
    static int taken = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto take = [&] { return taken < slots ? taken++ : -1; };
    if (status != cudaStreamCaptureStatusNone) return take();
    const auto found = of_streams.find({device_, stream});
    if (found != of_streams.end()) return found->second;
    return of_streams[{device_, stream}] = take();
  }

  cudaStream_t stream;

 private:
  static void check(const char* name, cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, name, " could not be launched: ", cudaGetErrorString(error));
  }

  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace diffmas
