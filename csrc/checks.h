// Argument checks and tensor views that the CPU and the CUDA launchers share. An error names the argument, what it was
// and what is allowed.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "diffmas/offsets.h"
#include "ops.h"

namespace diffmas {

constexpr int64_t ANY = -1;

template <class Sizes>
std::string to_string(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (int64_t size : sizes) {
    text << separator;
    size == ANY ? text << "any" : text << size;
    separator = ", ";
  }
  text << (sizes.size() == 0 ? "[]" : "]");
  return text.str();
}

/// float64 for float64 data, float32 for the other three supported dtypes.
/// An argument, or an element of a list; put into words only where it is at fault.
struct Name {
  Name(const char* argument, int64_t index = ANY) : argument(argument), index(index) {}

  const char* argument;
  int64_t index;
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  return name.index == ANY ? out : out << "[" << name.index << "]";
}

inline ScalarType accumulation_dtype(const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      name, " is ", torch::headeronly::toString(dtype), "; allowed: Float, BFloat16, Half, Double");
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// Same device as `like`, this dtype, these sizes (ANY: any), and stride 1 in the last dimension.
inline void check_tensor(
    const Name& name, const Tensor& tensor, std::initializer_list<int64_t> sizes, ScalarType dtype,
    const Tensor& like) {
  const auto found = tensor.sizes();
  bool matches = found.size() == sizes.size();
  if (matches) {
    const int64_t* size = found.begin();
    for (int64_t wanted : sizes) {
      matches &= wanted == ANY || wanted == *size;
      ++size;
    }
  }
  STD_TORCH_CHECK(matches, name, " has shape ", to_string(found), "; allowed: ", to_string(sizes));
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, name, " is ", torch::headeronly::toString(tensor.scalar_type()),
      "; allowed: ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(
      tensor.device() == like.device(), name, " is on another device (",
      tensor.is_cuda() ? "cuda:" : "cpu:", tensor.get_device_index(), ") than the other arguments");
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(
      last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1, name, " has stride ", tensor.stride(last),
      " in its last dimension; allowed: 1");
}

inline void check_contiguous(const Name& name, const Tensor& tensor) {
  STD_TORCH_CHECK(
      tensor.is_contiguous(), name, " has strides ", to_string(tensor.strides()), " for shape ",
      to_string(tensor.sizes()), "; allowed: contiguous");
}

inline void check_dim(const Name& name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(
      tensor.dim() == dim, name, " has shape ", to_string(tensor.sizes()), "; allowed: ", dim, " dimensions");
}

/// Values and keys of one trace layer [B, Hkv, C, D]; the keys set the sizes.
inline void check_trace(
    const char* keys_name, const Tensor& keys, const char* values_name, const Tensor& values, ScalarType dtype) {
  check_dim(keys_name, keys, 4);
  check_tensor(keys_name, keys, {ANY, ANY, ANY, ANY}, dtype, keys);
  check_tensor(values_name, values, {keys.size(0), keys.size(1), keys.size(2), keys.size(3)}, dtype, keys);
}

/// Index tensors: int32 [batch], contiguous.
inline void check_index(const char* name, const Tensor& index, int64_t batch, const Tensor& like) {
  check_tensor(name, index, {batch}, ScalarType::Int, like);
}

template <class T>
Packed<T> packed(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

template <class T>
Trace<T> trace(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline const int32_t* indices(const Tensor& tensor) { return static_cast<const int32_t*>(tensor.data_ptr()); }

/// Uninitialised and contiguous, on the device of `like`.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  // Not by way of the dispatcher, which costs more than the allocation: a single token's layer makes some fifty of them.
  int64_t strides[8], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes.begin()[i])) strides[i] = stride;
  int32_t type, index;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.begin(), strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      type, index, &handle));
  return Tensor(handle);
}

}  // namespace diffmas
