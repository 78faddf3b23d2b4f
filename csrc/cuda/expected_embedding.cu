#include "diffmas/expected_embedding.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace diffmas {

namespace {

template <class T>
Matrix<T> matrix(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data_ptr()), tensor.stride(0), static_cast<int>(tensor.size(1))};
}

/// The sums of all parts of a vocabulary and what belongs to them, before they are put together.
template <class T>
struct VocabularyParts {
  Tensor memory;
  int count;
  Acc<T>*sums, *highest, *total;
};

/// Runs the kernel over the vocabulary. One block a multiprocessor: its sums take half of the registers, and more parts
/// would be more to put together.
template <class T, bool BACKWARD>
VocabularyParts<T> over_parts(
    const char* name, const LaunchScope& scope, const Tensor& like, VocabularyArguments<T, BACKWARD> a,
    bool tensor_cores) {
  constexpr int NARROW = 1024, WIDE = 2048;
  const int64_t size = a.size(), tiles = std::max<int64_t>(divide_up(a.rows, VOCABULARY_ROWS), 1);
  const int64_t chunks = tensor_cores ? divide_up(size, WIDE) : 1;
  a.chunk = static_cast<int>(divide_up(divide_up(size, chunks), VOCABULARY_PIECE) * VOCABULARY_PIECE);
  const int64_t most = std::min<int64_t>(divide_up(a.vocab, VOCABULARY_TOKENS), MAX_VOCABULARY_PARTS);
  const int64_t parts = std::clamp<int64_t>(scope.multiprocessors() / (tiles * chunks), 1, most),
                pairs = parts * a.rows;
  const Tensor memory = new_tensor(like, {pairs * (size + 2)}, accumulation_dtype("hidden", like.scalar_type()));
  a.sums = static_cast<Acc<T>*>(memory.data_ptr());
  a.highest = a.sums + pairs * size;
  a.total = a.highest + pairs;
  const dim3 grid(tiles, chunks, parts);
  const auto run = [&](auto kernel, size_t shared) {
    if (a.rows > 0) scope.launch(name, kernel, grid, VOCABULARY_THREADS, shared, a);
  };
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores && a.chunk <= NARROW)
      run(vocabulary_kernel<T, BACKWARD, NARROW>, sizeof(VocabularyShared<T, BACKWARD>));
    else if (tensor_cores)
      run(vocabulary_kernel<T, BACKWARD, WIDE>, sizeof(VocabularyShared<T, BACKWARD>));
  }
  if (!tensor_cores) run(vocabulary_simple_kernel<T, BACKWARD>, sizeof(SimpleVocabularyShared<Acc<T>, BACKWARD>));
  return {memory, static_cast<int>(parts), a.sums, a.highest, a.total};
}

/// What forward and backward have in common. Passes follow.
template <class T, bool BACKWARD>
VocabularyArguments<T, BACKWARD> arguments(
    const Tensor& hidden, const Tensor& keys, const OptionalTensor& bias, const Tensor& temperature, double scale,
    std::optional<double> softcap) {
  VocabularyArguments<T, BACKWARD> a{};
  a.bias = bias ? static_cast<const T*>(bias->data_ptr()) : nullptr;
  a.temperature = static_cast<const Acc<T>*>(temperature.data_ptr());
  a.rows = static_cast<int>(hidden.size(0));
  a.vocab = static_cast<int>(keys.size(0));
  a.scale = static_cast<Acc<T>>(scale);
  a.softcap = {static_cast<Acc<T>>(softcap.value_or(0))};
  return a;
}

}  // namespace

std::tuple<Tensor, Tensor> expected_embedding(
    const Tensor& hidden, const Tensor& keys, const Tensor& values, const OptionalTensor& bias,
    const Tensor& temperature, double scale, std::optional<double> softcap) {
  const ScalarType acc = check_expected(hidden, keys, values, bias, temperature, softcap);
  const int64_t rows = hidden.size(0), width = values.size(1);
  const Tensor out = new_tensor(hidden, {rows, width}, hidden.scalar_type()), lse = new_tensor(hidden, {rows}, acc);
  if (rows == 0) return {out, lse};
  const LaunchScope scope(hidden);
  const bool tensor_cores = hidden.size(1) > 0 && width > 0 && suits_tensor_cores({&hidden, &keys, &values});
  with_storage_type("hidden", hidden.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    auto a = arguments<T, false>(hidden, keys, bias, temperature, scale, softcap);
    a.passes[0] = {matrix<T>(hidden), matrix<T>(keys)};
    a.passes[1].tokens = matrix<T>(values);
    const auto parts = over_parts("expected_embedding", scope, hidden, a, tensor_cores);
    const dim3 grid(std::max<int64_t>(divide_up(width, VOCABULARY_THREADS), 1), rows);
    scope.launch(
        "expected_embedding", combine_vocabulary_kernel<T>, grid, VOCABULARY_THREADS, 0, parts.sums, parts.highest,
        parts.total, static_cast<T*>(out.data_ptr()), static_cast<Acc<T>*>(lse.data_ptr()), a.rows, parts.count,
        static_cast<int>(width));
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> expected_embedding_backward(
    const Tensor& grad_out, const Tensor& hidden, const Tensor& keys, const Tensor& values, const OptionalTensor& bias,
    const Tensor& temperature, const Tensor& out, const Tensor& lse, double scale, std::optional<double> softcap) {
  const ScalarType acc = check_expected_backward(grad_out, hidden, keys, values, bias, temperature, out, lse, softcap);
  check_contiguous("out", out);
  check_contiguous("lse", lse);
  const int64_t rows = hidden.size(0), depth = hidden.size(1);
  const Tensor grad_hidden = new_tensor(hidden, {rows, depth}, hidden.scalar_type());
  const Tensor grad_temperature = new_tensor(hidden, {1}, acc);
  const LaunchScope scope(hidden);
  const bool tensor_cores =
      depth > 0 && values.size(1) > 0 && suits_tensor_cores({&hidden, &keys, &values, &grad_out, &out});
  with_storage_type("hidden", hidden.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    auto a = arguments<T, true>(hidden, keys, bias, temperature, scale, softcap);
    a.passes[0] = {matrix<T>(grad_out), matrix<T>(values)};
    a.passes[1] = {matrix<T>(hidden), matrix<T>(keys)};
    a.passes[2].tokens = matrix<T>(keys);
    a.out = static_cast<const T*>(out.data_ptr());
    a.lse = static_cast<const Acc<T>*>(lse.data_ptr());
    const auto parts = over_parts("expected_embedding_backward", scope, hidden, a, tensor_cores);
    const dim3 grid(std::max<int64_t>(divide_up(depth, VOCABULARY_THREADS), 1), std::max<int64_t>(rows, 1));
    scope.launch(
        "expected_embedding_backward", combine_gradients_kernel<T>, grid, VOCABULARY_THREADS, 0, parts.sums,
        parts.total, a.temperature, static_cast<T*>(grad_hidden.data_ptr()),
        static_cast<Acc<T>*>(grad_temperature.data_ptr()), a.rows, parts.count, static_cast<int>(depth));
  });
  return {grad_hidden, grad_temperature};
}

}  // namespace diffmas
