#include "diffmas/concat.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace diffmas {

namespace {

template <class T>
Layers<T> layers(const Tensor& tensor) {
  return {{static_cast<T*>(tensor.data_ptr()), tensor.stride(1), tensor.stride(2), tensor.stride(3)}, tensor.stride(0)};
}

/// A concatenation in either direction: `part_*` are the senders' tensors, `keys` and `values` those of the whole.
struct Concatenation {
  const char* name;
  const std::vector<Tensor>&part_keys, &part_values;
  const Tensor &keys, &values, &source_begin, &counts, &dest_begin;
  const OptionalTensor &cos, &sin;
  bool interleaved;

  int64_t half() const { return cos.has_value() ? cos->size(2) : 0; }

  /// Whether heads fall into pairs of vectors of `elements` that turn with each other, all aligned.
  bool vectors(size_t first, size_t last, int elements) const {
    int64_t alignment = common_alignment({&keys, &values});
    for (size_t i = first; i < last; ++i)
      alignment = std::min(alignment, common_alignment({&part_keys[i], &part_values[i]}));
    if (cos.has_value()) alignment = std::min(alignment, common_alignment({&*cos, &*sin}));
    return alignment == 16 && keys.size(4) % (2 * elements) == 0 && half() % elements == 0;
  }

  /// Senders first … last - 1, all of type P.
  template <bool BACKWARD, class P, class W>
  void launch(const LaunchScope& scope, size_t first, size_t last) const {
    using A = Acc<W>;
    const int64_t batch = keys.size(1), offset = static_cast<int64_t>(first) * batch;
    ConcatArguments<P, W> a{};
    a.senders = static_cast<int>(last - first);
    for (int i = 0; i < a.senders; ++i) {
      const Tensor &part_key = part_keys[first + i], &part_value = part_values[first + i];
      a.part_keys[i] = layers<P>(part_key);
      a.part_values[i] = layers<P>(part_value);
      for (int other = 0; other < a.senders; ++other)
        a.same[i] |= uint32_t(part_keys[first + other].data_ptr() == part_key.data_ptr()) << other;
    }
    a.keys = layers<W>(keys);
    a.values = layers<W>(values);
    a.source_begin = indices(source_begin) + offset;
    a.counts = indices(counts) + offset;
    a.dest_begin = indices(dest_begin) + offset;
    if (cos.has_value()) {
      a.cos = static_cast<const A*>(cos->data_ptr()) + offset * half();
      a.sin = static_cast<const A*>(sin->data_ptr()) + offset * half();
    }
    a.layers = static_cast<int>(keys.size(0));
    a.batch = static_cast<int>(batch);
    a.heads = static_cast<int>(keys.size(2));
    a.dim = static_cast<int>(keys.size(4));
    a.half = static_cast<int>(half());
    a.interleaved = interleaved;
    const size_t shared = (a.senders * batch + 1) * sizeof(int);
    const dim3 grid(scope.multiprocessors() * (2048 / CONCAT_THREADS));
    constexpr int N = 16 / std::max(sizeof(P), sizeof(W));
    if (vectors(first, last, N))
      scope.launch(name, concat_kernel<P, W, N, BACKWARD>, grid, CONCAT_THREADS, shared, a, a.dim / (2 * N));
    else
      scope.launch(name, concat_kernel<P, W, 1, BACKWARD>, grid, CONCAT_THREADS, shared, a, (a.dim + 1) / 2);
  }

  /// Calls run(first, last) for stretches of senders of one type that fit a launch.
  template <class F>
  void for_stretches(F run) const {
    const size_t senders = part_keys.size();
    for (size_t first = 0, last = 0; first < senders; first = last) {
      while (last < senders && last - first < MAX_SENDERS &&
             part_keys[last].scalar_type() == part_keys[first].scalar_type())
        ++last;
      run(first, last);
    }
  }
};

}  // namespace

void kv_concat(
    const std::vector<Tensor>& source_keys, const std::vector<Tensor>& source_values, const Tensor& keys,
    const Tensor& values, const Tensor& source_begin, const Tensor& counts, const Tensor& dest_begin,
    const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved) {
  check_concat_plan(keys, values, source_keys.size(), source_values.size(), source_begin, counts, dest_begin, cos, sin);
  check_concat("source_keys", source_keys, "keys", keys);
  check_concat("source_values", source_values, "values", values);
  for (size_t i = 0; i < source_keys.size(); ++i)
    STD_TORCH_CHECK(
        source_keys[i].scalar_type() == source_values[i].scalar_type(), "source_values[", i, "] is ",
        torch::headeronly::toString(source_values[i].scalar_type()),
        "; allowed: ", torch::headeronly::toString(source_keys[i].scalar_type()), ", the dtype of source_keys[", i,
        "]");
  if (keys.numel() == 0) return;
  const LaunchScope scope(keys);
  const Concatenation concatenation{"kv_concat", source_keys, source_values, keys, values,     source_begin,
                                    counts,      dest_begin,  cos,           sin,  interleaved};
  concatenation.for_stretches([&](size_t first, size_t last) {
    with_storage_type("source_keys", source_keys[first].scalar_type(), [&](auto part) {
      using P = decltype(part);
      with_storage_type("keys", keys.scalar_type(), [&](auto whole) {
        using W = decltype(whole);
        if constexpr (std::is_same_v<Acc<P>, Acc<W>>) concatenation.launch<false, P, W>(scope, first, last);
      });
    });
  });
}

void kv_concat_backward(
    const Tensor& grad_keys, const Tensor& grad_values, const std::vector<Tensor>& source_grad_keys,
    const std::vector<Tensor>& source_grad_values, const Tensor& source_begin, const Tensor& counts,
    const Tensor& dest_begin, const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved) {
  check_concat_plan(
      grad_keys, grad_values, source_grad_keys.size(), source_grad_values.size(), source_begin, counts, dest_begin, cos,
      sin);
  check_accumulators("grad_keys", grad_keys, "source_grad_keys", source_grad_keys);
  check_accumulators("grad_values", grad_values, "source_grad_values", source_grad_values);
  if (grad_keys.numel() == 0) return;
  const LaunchScope scope(grad_keys);
  const Concatenation concatenation{"kv_concat_backward", source_grad_keys, source_grad_values, grad_keys, grad_values,
                                    source_begin,         counts,           dest_begin,         cos,       sin,
                                    interleaved};
  concatenation.for_stretches([&](size_t first, size_t last) {
    grad_keys.scalar_type() == ScalarType::Double ? concatenation.launch<true, double, double>(scope, first, last)
                                                  : concatenation.launch<true, float, float>(scope, first, last);
  });
}

}  // namespace diffmas
