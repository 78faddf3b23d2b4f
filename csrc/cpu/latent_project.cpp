#include <cmath>

#include "cpu/few_rows.h"

namespace diffmas {

namespace {

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
    PaddedRows<A> y = read<S>(hidden);
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
    PaddedRows<A> grad_y = read<S>(grad_out), unit = read<S>(out);
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
      PaddedRows<A> x = read<S>(hidden);
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
