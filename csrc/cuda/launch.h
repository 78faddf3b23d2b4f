// What every CUDA launcher needs: the tensor's device and stream, and a check after the launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"

namespace diffmas {

/// Makes `tensor`'s device the current one for its scope and holds that device's current stream.
class LaunchScope {
 public:
  explicit LaunchScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
  }

  void check(const char* kernel) const {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, kernel, " could not be launched: ", cudaGetErrorString(error));
  }

  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace diffmas
