#include "diffmas/project.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace diffmas {

namespace {

/// Splits of the sum, so that the blocks of all column and row tiles are resident at once and no block is left for a
/// second wave; every split has at least MIN_STEPS steps, because its part of the result is written and read once more.
int sum_splits(const LaunchScope& scope, int64_t size, int64_t tiles) {
  constexpr int64_t BLOCKS_PER_MULTIPROCESSOR = 4, MIN_STEPS = 4;
  const int64_t wanted = scope.multiprocessors() * BLOCKS_PER_MULTIPROCESSOR / tiles;
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, size / PRODUCT_DEPTH / MIN_STEPS)));
}

/// Writes x W or x W^T, finished: as one launch where up to 16 rows suit the tensor cores, otherwise as two.
template <class T, class Finish>
void multiply_and_finish(
    const char* name, const LaunchScope& scope, const StackedRows<T>& x, const Tensor& weight, bool tensor_cores,
    const Finish& finish) {
  const int64_t size = weight.size(0), columns = divide_up(size, PRODUCT_COLUMNS);
  const int tile_rows = !tensor_cores ? SIMPLE_PRODUCT_ROWS : x.rows <= 16 ? 16 : 64;
  const int64_t row_tiles = divide_up(x.rows, tile_rows);
  const int splits = sum_splits(scope, size, columns * row_tiles);
  const int64_t elements = splits * x.rows * size;
  // The terms of the rows' sums lie behind the parts.
  const Tensor memory =
      new_tensor(weight, {elements + 16 * columns}, accumulation_dtype("weight", weight.scalar_type()));
  const auto parts = static_cast<Acc<T>*>(memory.data_ptr());
  const ProductArguments<T> product{
      x, static_cast<const T*>(weight.data_ptr()), weight.stride(0), static_cast<int>(size), parts};
  const dim3 grid(columns, splits, row_tiles);
  int slot = -1;
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores && tile_rows == 16) {
      slot = columns <= MAX_COUNTED_TILES ? scope.unused_slot(COUNTER_SLOTS) : -1;
      scope.launch(
          name, product_kernel<T, 1, Finish>, grid, PRODUCT_THREADS, sizeof(ProductShared<T, 1>), product, finish, slot,
          parts + elements);
    } else if (tensor_cores) {
      scope.launch(
          name, product_kernel<T, 4, Finish>, grid, PRODUCT_THREADS, sizeof(ProductShared<T, 4>), product, finish, slot,
          parts + elements);
    }
  }
  if (!tensor_cores)
    scope.launch(
        name, product_simple_kernel<T, Finish::TRANSPOSED>, grid, PRODUCT_THREADS, sizeof(SimpleProductShared<Acc<T>>),
        product);
  if (slot < 0)
    scope.launch(
        name, rescale_kernel<T, Finish>, dim3(finish.rows), FINISH_THREADS, 0, ProductRows<T>{product, splits}, finish);
}

/// Finishes the rows themselves, without a product.
template <class T, class Finish>
void finish_rows(
    const char* name, const LaunchScope& scope, const StackedRows<T>& x, int64_t size, const Finish& finish) {
  const ProductRows<T> rows{{x, nullptr, 0, static_cast<int>(size), nullptr}, 0};
  scope.launch(name, rescale_kernel<T, Finish>, dim3(finish.rows), FINISH_THREADS, 0, rows, finish);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> latent_project(const Tensor& hidden, const OptionalTensor& weight, double target_norm) {
  const ScalarType acc = check_project(hidden, weight);
  const int64_t rows = hidden.size(0), size = hidden.size(1);
  const Tensor out = new_tensor(hidden, {rows, size}, hidden.scalar_type()), norm = new_tensor(hidden, {rows}, acc);
  if (rows == 0) return {out, norm};
  const LaunchScope scope(hidden);
  with_storage_type("hidden", hidden.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    const int count = static_cast<int>(rows);
    const StackedRows<T> x{data<T>(hidden), nullptr, hidden.stride(0), 0, count, count};
    const Rescale<T> finish{
        static_cast<T*>(out.data_ptr()), static_cast<Acc<T>*>(norm.data_ptr()), static_cast<Acc<T>>(target_norm),
        count};
    if (weight && size > 0)
      multiply_and_finish("latent_project", scope, x, *weight, suits_tensor_cores({&hidden, &*weight}), finish);
    else
      finish_rows("latent_project", scope, x, size, finish);
  });
  return {out, norm};
}

std::tuple<Tensor, Tensor> latent_project_backward(
    const Tensor& grad_out, const Tensor& hidden, const OptionalTensor& weight, const Tensor& out, const Tensor& norm,
    double target_norm, bool need_weight) {
  const ScalarType acc = check_project_backward(grad_out, hidden, weight, out, norm);
  check_contiguous("norm", norm);
  const int64_t rows = hidden.size(0), size = hidden.size(1);
  const bool weight_gradient = weight.has_value() && need_weight;
  const Tensor grad_hidden = new_tensor(hidden, {rows, size}, hidden.scalar_type());
  const Tensor grad_weight = weight_gradient ? new_tensor(hidden, {size, size}, acc) : new_tensor(hidden, {0}, acc);
  if (size == 0) return {grad_hidden, grad_weight};
  const LaunchScope scope(hidden);
  with_storage_type("hidden", hidden.scalar_type(), [&](auto storage) {
    using T = decltype(storage);
    using A = Acc<T>;
    const int count = static_cast<int>(rows);
    const Tensor grad_y = new_tensor(hidden, {weight_gradient ? rows : 0, size}, acc);
    if (rows > 0) {
      const StackedRows<T> x{data<T>(grad_out), data<T>(out), grad_out.stride(0), out.stride(0), count, 2 * count};
      const RescaleBackward<T> finish{
          data<A>(norm), static_cast<A>(target_norm), static_cast<T*>(grad_hidden.data_ptr()),
          weight_gradient ? static_cast<A*>(grad_y.data_ptr()) : nullptr, count};
      if (weight)
        multiply_and_finish(
            "latent_project_backward", scope, x, *weight, suits_tensor_cores({&grad_out, &out, &*weight}), finish);
      else
        finish_rows("latent_project_backward", scope, x, size, finish);
    }
    if (!weight_gradient) return;
    const StackedRows<T> x{data<T>(hidden), nullptr, hidden.stride(0), 0, count, count};
    const int64_t tiles = divide_up(size, OUTER_TILE);
    scope.launch(
        "latent_project_backward", outer_product_kernel<T>, dim3(tiles, tiles), OUTER_THREADS, sizeof(OuterShared<A>),
        x, data<A>(grad_y), static_cast<A*>(grad_weight.data_ptr()), static_cast<int>(size));
  });
  return {grad_hidden, grad_weight};
}

}  // namespace diffmas
