#include <cmath>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace diffmas {

namespace {

/// An [N, H] operand in the accumulation type, rows padded with zeros to whole vectors.
template <class A>
struct Rows {
  Rows(int64_t rows, int64_t size)
      : rows(rows), size(size), stride((size + PADDING - 1) / PADDING * PADDING), memory(rows * stride) {}

  A* row(int64_t i) { return memory.data() + i * stride; }

  int64_t rows, size, stride;
  Buffer<A> memory;
};

template <class S>
Rows<Acc<S>> read(const Tensor& tensor) {
  using A = Acc<S>;
  Rows<A> result(tensor.size(0), tensor.size(1));
  const auto convert = DIFFMAS_KERNEL(move_columns<S, A>);
  for (int64_t i = 0; i < result.rows; ++i) {
    MoveColumns<S, A> move{};
    move.source = static_cast<const S*>(tensor.data_ptr()) + i * tensor.stride(0);
    move.target = result.row(i);
    move.count = 1;
    move.dim = result.size;
    convert(move, scratch<A>(2 * (result.size + PADDING)));
    std::fill(result.row(i) + result.size, result.row(i) + result.stride, A(0));
  }
  return result;
}

template <class S>
void write(Rows<Acc<S>>& rows, const Tensor& tensor) {
  using A = Acc<S>;
  const auto convert = DIFFMAS_KERNEL(move_columns<A, S>);
  for (int64_t i = 0; i < rows.rows; ++i) {
    MoveColumns<A, S> move{};
    move.source = rows.row(i);
    move.target = static_cast<S*>(tensor.data_ptr()) + i * tensor.stride(0);
    move.count = 1;
    move.dim = rows.size;
    convert(move, scratch<A>(2 * (rows.size + PADDING)));
  }
}

/// x @ weight, or x @ weightᵀ.
template <class S>
Rows<Acc<S>> multiply(Rows<Acc<S>>& x, const Tensor& weight, bool transposed) {
  using A = Acc<S>;
  Rows<A> y(x.rows, x.size);
  const Projection<S> projection{
      x.memory.data(), y.memory.data(), x.rows, x.size, x.stride, static_cast<const S*>(weight.data_ptr()),
      weight.stride(0)};
  const auto kernel = transposed ? DIFFMAS_KERNEL(project_transposed<S>) : DIFFMAS_KERNEL(project<S>);
  // Long stretches of a weight's rows stream well; a transposed product reads whole rows anyway.
  const int64_t width = transposed ? PROJECTION_ROWS : PROJECTION_COLUMNS;
  parallel_tasks((x.size + width - 1) / width, x.rows * x.size * x.size, [&](int64_t task) {
    kernel(projection, task * width, std::min(x.size, (task + 1) * width), scratch<A>(projection_scratch(x.stride)));
  });
  return y;
}

template <class A>
A scale(A norm, double target_norm) {
  return norm > 0 ? static_cast<A>(target_norm) / norm : A(0);
}

}  // namespace

std::tuple<Tensor, Tensor> latent_project(const Tensor& hidden, const OptionalTensor& weight, double target_norm) {
  const ScalarType acc = check_project(hidden, weight);
  const Tensor out = new_tensor(hidden, {hidden.size(0), hidden.size(1)}, hidden.scalar_type());
  const Tensor norm = new_tensor(hidden, {hidden.size(0)}, acc);
  with_storage_type("hidden", hidden.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    Rows<A> y = read<S>(hidden);
    if (weight) y = multiply<S>(y, *weight, false);
    for (int64_t i = 0; i < y.rows; ++i) {
      A* row = y.row(i);
      // In double, so that neither squares nor their sum leave the range.
      double squares = 0;
      for (int64_t d = 0; d < y.size; ++d) squares += double(row[d]) * double(row[d]);
      const A length = static_cast<A>(std::sqrt(squares));
      static_cast<A*>(norm.data_ptr())[i] = length;
      const A factor = scale(length, target_norm);
      for (int64_t d = 0; d < y.size; ++d) row[d] *= factor;
    }
    write<S>(y, out);
  });
  return {out, norm};
}

std::tuple<Tensor, Tensor> latent_project_backward(
    const Tensor& grad_out, const Tensor& hidden, const OptionalTensor& weight, const Tensor& out, const Tensor& norm,
    double target_norm, bool need_weight) {
  const ScalarType acc = check_project_backward(grad_out, hidden, weight, out, norm);
  const int64_t size = hidden.size(1);
  const bool weight_gradient = weight.has_value() && need_weight;
  const Tensor grad_hidden = new_tensor(hidden, {hidden.size(0), size}, hidden.scalar_type());
  const Tensor grad_weight = weight_gradient ? new_tensor(hidden, {size, size}, acc) : new_tensor(hidden, {0}, acc);
  with_storage_type("hidden", hidden.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using A = Acc<S>;
    Rows<A> grad_y = read<S>(grad_out), unit = read<S>(out);
    const A* norms = static_cast<const A*>(norm.data_ptr());
    for (int64_t i = 0; i < grad_y.rows; ++i) {
      A *grad = grad_y.row(i), *u = unit.row(i);
      double along = 0;
      for (int64_t d = 0; d < size; ++d) along += double(u[d]) * double(grad[d]);
      const A projection = static_cast<A>(along / (target_norm * target_norm));
      const A factor = scale(norms[i * norm.stride(0)], target_norm);
      for (int64_t d = 0; d < size; ++d) grad[d] = factor * (grad[d] - projection * u[d]);
    }
    if (weight_gradient) {
      Rows<A> x = read<S>(hidden);
      const auto kernel = DIFFMAS_KERNEL(outer_product<A>);
      const OuterProduct<A> product{
          x.memory.data(), grad_y.memory.data(), static_cast<A*>(grad_weight.data_ptr()), x.rows, size, x.stride};
      const int64_t height = PROJECTION_ROWS;
      parallel_tasks((size + height - 1) / height, x.rows * size * size, [&](int64_t task) {
        kernel(product, task * height, std::min(size, (task + 1) * height), scratch<A>(height * PADDING));
      });
    }
    if (weight) grad_y = multiply<S>(grad_y, *weight, true);
    write<S>(grad_y, grad_hidden);
  });
  return {grad_hidden, grad_weight};
}

}  // namespace diffmas
