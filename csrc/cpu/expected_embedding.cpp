#include <cmath>

#include "cpu/few_rows.h"

namespace diffmas {

namespace {

/// VocabularyParts of a vocabulary, cut alike whatever the number of rows and threads.
struct VocabularyParts {
  explicit VocabularyParts(int64_t vocabulary)
      : vocabulary(vocabulary),
        height((vocabulary / MOST + STEP) / STEP * STEP),
        count((vocabulary + height - 1) / height) {}

  /// Runs task(part, begin, end) for all of them.
  template <class Task>
  void run(int64_t work, const Task& task) const {
    parallel_tasks(
        count, work, [&](int64_t part) { task(part, part * height, std::min(vocabulary, (part + 1) * height)); });
  }

  static constexpr int64_t MOST = 32;
  int64_t vocabulary, height, count;
};

template <class S>
Matrix<const S> matrix(const Tensor& tensor) {
  return {static_cast<const S*>(tensor.data_ptr()), tensor.stride(0)};
}

template <class S>
Vocabulary<S> vocabulary(
    PaddedRows<Acc<S>>& x, const Tensor& keys, const Tensor& values, const OptionalTensor& bias,
    const Tensor& temperature, double scale, std::optional<double> softcap) {
  using A = Acc<S>;
  return {
      {x.memory.data(), x.stride},
      matrix<S>(keys),
      matrix<S>(values),
      bias ? static_cast<const S*>(bias->data_ptr()) : nullptr,
      x.rows,
      keys.size(1),
      values.size(1),
      static_cast<A>(scale),
      static_cast<A>(softcap.value_or(0)),
      *static_cast<const A*>(temperature.data_ptr())};
}

}  // namespace

std::tuple<Tensor, Tensor> expected_embedding(
    const Tensor& hidden, const Tensor& keys, const Tensor& values, const OptionalTensor& bias,
    const Tensor& temperature, double scale, std::optional<double> softcap) {
  const ScalarType acc = check_expected(hidden, keys, values, bias, temperature, softcap);
  const int64_t rows = hidden.size(0), width = values.size(1);
  const Tensor out = new_tensor(hidden, {rows, width}, hidden.scalar_type());
  const Tensor lse = new_tensor(hidden, {rows}, acc);
  if (rows == 0) return {out, lse};
  with_storage_type("hidden", hidden.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    PaddedRows<A> x = read<S>(hidden);
    const VocabularyParts parts(keys.size(0));
    PaddedRows<A> partial(parts.count * rows, width);
    Buffer<A> highest(parts.count * rows), total(parts.count * rows);
    const auto kernel = DIFFMAS_KERNEL(expected_embedding<S>);
    const auto given = vocabulary<S>(x, keys, values, bias, temperature, scale, softcap);
    const int64_t room = vocabulary_scratch(rows, std::max(x.stride, partial.stride));
    parts.run(rows * parts.vocabulary * (x.size + width), [&](int64_t part, int64_t begin, int64_t end) {
      const int64_t at = part * rows;
      const ExpectedEmbedding<S> embedding{
          given, partial.row(at), highest.data() + at, total.data() + at, partial.stride};
      kernel(embedding, begin, end, scratch<A>(room));
    });
    PaddedRows<A> merged(rows, width);
    std::fill_n(merged.memory.data(), rows * merged.stride, A(0));
    for (int64_t row = 0; row < rows; ++row) {
      A top = highest.data()[row];
      for (int64_t part = 1; part < parts.count; ++part) top = std::max(top, highest.data()[part * rows + row]);
      A sum = 0, *target = merged.row(row);
      for (int64_t part = 0; part < parts.count; ++part) {
        const int64_t at = part * rows + row;
        const A weight = std::exp(highest.data()[at] - top), *source = partial.row(at);
        sum += weight * total.data()[at];
        for (int64_t d = 0; d < width; ++d) target[d] += weight * source[d];
      }
      for (int64_t d = 0; d < width; ++d) target[d] /= sum;
      static_cast<A*>(lse.data_ptr())[row] = top + std::log(sum);
    }
    write<S>(merged, out);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> expected_embedding_backward(
    const Tensor& grad_out, const Tensor& hidden, const Tensor& keys, const Tensor& values, const OptionalTensor& bias,
    const Tensor& temperature, const Tensor& out, const Tensor& lse, double scale, std::optional<double> softcap) {
  const ScalarType acc = check_expected_backward(grad_out, hidden, keys, values, bias, temperature, out, lse, softcap);
  const int64_t rows = hidden.size(0), depth = keys.size(1);
  const Tensor grad_hidden = new_tensor(hidden, {rows, depth}, hidden.scalar_type());
  const Tensor grad_temperature = new_tensor(hidden, {1}, acc);
  with_storage_type("hidden", hidden.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    A& of_temperature = *static_cast<A*>(grad_temperature.data_ptr());
    of_temperature = 0;
    if (rows == 0) return;
    PaddedRows<A> x = read<S>(hidden), grad = read<S>(grad_out), result = read<S>(out);
    std::vector<A> delta(rows), sums(rows);
    for (int64_t row = 0; row < rows; ++row) {
      double along = 0;
      for (int64_t d = 0; d < grad.size; ++d) along += double(grad.row(row)[d]) * double(result.row(row)[d]);
      delta[row] = static_cast<A>(along);
      sums[row] = static_cast<const A*>(lse.data_ptr())[row * lse.stride(0)];
    }
    const VocabularyParts parts(keys.size(0));
    PaddedRows<A> partial(parts.count * rows, depth);
    Buffer<A> scores(parts.count * rows);
    const auto kernel = DIFFMAS_KERNEL(expected_embedding_gradient<S>);
    const auto given = vocabulary<S>(x, keys, values, bias, temperature, scale, softcap);
    const int64_t room = vocabulary_scratch(rows, std::max(x.stride, grad.stride));
    parts.run(rows * parts.vocabulary * (2 * x.size + grad.size), [&](int64_t part, int64_t begin, int64_t end) {
      const ExpectedEmbeddingGradient<S> gradient{
          given,         {grad.memory.data(), grad.stride}, sums.data(),
          delta.data(),  partial.row(part * rows),          scores.data() + part * rows,
          partial.stride};
      kernel(gradient, begin, end, scratch<A>(room));
    });
    PaddedRows<A> total(rows, depth);
    std::fill_n(total.memory.data(), rows * total.stride, A(0));
    double all_scores = 0;
    for (int64_t part = 0; part < parts.count; ++part)
      for (int64_t row = 0; row < rows; ++row) {
        const A* owed = partial.row(part * rows + row);
        for (int64_t d = 0; d < depth; ++d) total.row(row)[d] += owed[d];
        all_scores += scores.data()[part * rows + row];
      }
    of_temperature = static_cast<A>(-all_scores / given.temperature);
    write<S>(total, grad_hidden);
  });
  return {grad_hidden, grad_temperature};
}

}  // namespace diffmas
