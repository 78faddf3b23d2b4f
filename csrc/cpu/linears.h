// Linear layers with low-rank adapters (LoRA, arXiv 2106.09685): forward and backward. A few rows read every weight
// once; more go through PyTorch's matrix product.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include "cpu/few_rows_linears.h"

namespace diffmas {

/// Rows in pieces that do not depend on the number of threads.
template <class Task>
void in_rows(int64_t rows, int64_t work, const Task& task) {
  constexpr int64_t together = 16;
  parallel_tasks((rows + together - 1) / together, work, [&](int64_t i) {
    task(i * together, std::min(rows, (i + 1) * together));
  });
}

/// `x [rows, ...]` as the matrix that PyTorch's product takes; few rows are read by their stride alone.
inline Tensor as_matrix(const Tensor& x) {
  if (x.dim() == 2 || x.size(0) <= STREAMED_ROWS) return x;
  const int64_t sizes[] = {x.size(0), x.numel() / x.size(0)};
  return torch::stable::view(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2));
}

inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
void add_product(
    const Tensor& y, const Matrix<const T>& x, int64_t rank, const Tensor& b, bool transposed, T scaling,
    const T* bias) {
  if (rank == 0 && bias == nullptr) return;
  const int64_t rows = y.size(0), columns = y.size(1);
  const LowRank<T> product{matrix<T>(y), x, matrix<const T>(b), bias, rows, columns, rank, scaling, transposed};
  const auto kernel = DIFFMAS_KERNEL(add_low_rank<T>);
  in_rows(rows, rows * columns * (rank + 2), [&](int64_t begin, int64_t end) {
    kernel(product, begin, end, scratch<T>(rank * (columns + PADDING)));
  });
}

/// Layers of one input: writes their outputs, and returns their x Aᵀ side by side.
template <class T>
Tensor apply(const std::vector<Linear<T>>& layers, const Tensor& x, const std::vector<Tensor>& outs) {
  int64_t ranks = 0, offset = 0;
  for (const auto& layer : layers) ranks += layer.rank();
  const Tensor low = new_tensor(x, {x.size(0), ranks}, x.scalar_type());
  if (x.size(0) <= STREAMED_ROWS) {
    apply_few(layers, x, low, outs);
    return low;
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const Linear<T>& layer = layers[i];
    mm_out(outs[i], x, torch::stable::transpose(layer.weight, 0, 1));
    if (layer.rank() > 0) {
      Tensor target = low;
      mm_out(torch::stable::narrow(target, 1, offset, layer.rank()), x, torch::stable::transpose(layer.a, 0, 1));
    }
    const Matrix<const T> part{static_cast<const T*>(low.data_ptr()) + offset, ranks};
    add_product<T>(outs[i], part, layer.rank(), layer.b, true, layer.scaling, layer.bias);
    offset += layer.rank();
  }
  return low;
}

/// The gradient of x from those of the outputs; appends those of each adapter's A and B to `adapters`.
template <class T>
Tensor gradients(
    const std::vector<Linear<T>>& layers, const Tensor& x, const Tensor& low, const std::vector<Tensor>& grads,
    std::vector<Tensor>& adapters) {
  const int64_t rows = x.size(0), size = layers.front().in();
  const Tensor grad_x = new_tensor(x, {rows, size}, x.scalar_type());
  const size_t first = adapters.size();
  for (const Linear<T>& layer : layers)
    if (layer.rank() > 0) {
      adapters.push_back(new_tensor(x, {layer.rank(), size}, x.scalar_type()));
      adapters.push_back(new_tensor(x, {layer.out(), layer.rank()}, x.scalar_type()));
    }
  if (rows <= STREAMED_ROWS) {
    gradients_few(layers, x, low, grads, grad_x, adapters.data() + first);
    return grad_x;
  }
  const Tensor product = layers.size() < 2 ? grad_x : new_tensor(x, {rows, size}, x.scalar_type());
  const Tensor* of_adapter = adapters.data() + first;
  int64_t offset = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Linear<T>& layer = layers[i];
    const int64_t rank = layer.rank();
    mm_out(i == 0 ? grad_x : product, grads[i], layer.weight);
    if (i > 0)
      in_rows(rows, rows * size, [&](int64_t begin, int64_t end) {
        const Matrix<T> to = matrix<T>(grad_x), from = matrix<T>(product);
        for (int64_t n = begin; n < end; ++n)
          for (int64_t d = 0; d < size; ++d) to.row(n)[d] += from.row(n)[d];
      });
    if (rank == 0) continue;
    const Tensor &grad_a = *of_adapter++, &grad_b = *of_adapter++;
    const Tensor grad_low = new_tensor(x, {rows, rank}, x.scalar_type());
    mm_out(grad_low, grads[i], layer.b);
    T* numbers = static_cast<T*>(grad_low.data_ptr());
    for (int64_t j = 0; j < rows * rank; ++j) numbers[j] *= layer.scaling;
    add_product<T>(grad_x, matrix<const T>(grad_low), rank, layer.a, false, T(1), nullptr);
    mm_out(grad_a, torch::stable::transpose(grad_low, 0, 1), x);
    Tensor lows = low;
    mm_out(grad_b, torch::stable::transpose(grads[i], 0, 1), torch::stable::narrow(lows, 1, offset, rank));
    T* owed = static_cast<T*>(grad_b.data_ptr());
    for (int64_t j = 0; j < layer.out() * rank; ++j) owed[j] *= layer.scaling;
    offset += rank;
  }
  return grad_x;
}

}  // namespace diffmas
