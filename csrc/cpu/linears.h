// Linear layers with low-rank adapters (LoRA, arXiv 2106.09685): forward and backward. A few rows read every weight
// once; more go through PyTorch's matrix product.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include "cpu/few_rows.h"

namespace diffmas {

template <class T>
Matrix<T> matrix(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0)};
}

/// Rows in pieces that do not depend on the number of threads.
template <class Task>
void in_rows(int64_t rows, int64_t work, const Task& task) {
  constexpr int64_t together = 16;
  parallel_tasks((rows + together - 1) / together, work, [&](int64_t i) {
    task(i * together, std::min(rows, (i + 1) * together));
  });
}

inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b), torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

/// y = x Wᵀ + bias + s (x Aᵀ) Bᵀ with x [N, in], W [out, in], A [r, in], B [out, r]; r = 0 and no bias are allowed.
template <class T>
struct Linear {
  Tensor weight, bias, a, b;
  T scaling;

  int64_t out() const { return weight.size(0); }
  int64_t rank() const { return a.size(0); }
  const T* bias_data() const { return bias.numel() == 0 ? nullptr : static_cast<const T*>(bias.data_ptr()); }
};

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
  const int64_t rows = x.size(0);
  int64_t ranks = 0, offset = 0, work = 0;
  for (const auto& layer : layers) ranks += layer.rank();
  const Tensor low = new_tensor(x, {rows, ranks}, x.scalar_type());
  const bool few = rows <= STREAMED_ROWS;
  const auto dot = DIFFMAS_KERNEL(project_transposed<T>);
  Rows<T> input = few ? read<T>(x) : Rows<T>(0, x.size(1));
  const int64_t room = projection_scratch(input.stride);
  const auto projection = [&](T* y, int64_t stride, const Tensor& weight) {
    return Projection<T>{input.memory.data(), y,      rows, input.size, input.stride, stride,
                         static_cast<const T*>(weight.data_ptr()), weight.stride(0)};
  };
  struct Piece {
    size_t layer;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Linear<T>& layer = layers[i];
    T* part = static_cast<T*>(low.data_ptr()) + offset;
    if (few) {
      dot(projection(part, ranks, layer.a), 0, layer.rank(), scratch<T>(room));
      for (int64_t begin = 0; begin < layer.out(); begin += PROJECTION_ROWS)
        pieces.push_back({i, begin, std::min(begin + PROJECTION_ROWS, layer.out())});
      work += rows * x.size(1) * layer.out();
    } else {
      mm_out(outs[i], x, torch::stable::transpose(layer.weight, 0, 1));
      if (layer.rank() > 0) {
        Tensor target = low;
        mm_out(torch::stable::narrow(target, 1, offset, layer.rank()), x, torch::stable::transpose(layer.a, 0, 1));
      }
    }
    offset += layer.rank();
  }
  parallel_tasks(pieces.size(), work, [&](int64_t task) {
    const Piece& piece = pieces[task];
    const Matrix<T> y = matrix<T>(outs[piece.layer]);
    dot(projection(y.data, y.stride, layers[piece.layer].weight), piece.begin, piece.end, scratch<T>(room));
  });
  offset = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Linear<T>& layer = layers[i];
    const Matrix<const T> part{static_cast<const T*>(low.data_ptr()) + offset, ranks};
    add_product<T>(outs[i], part, layer.rank(), layer.b, true, layer.scaling, layer.bias_data());
    offset += layer.rank();
  }
  return low;
}

/// The gradient of x from those of the outputs; appends those of each adapter's A and B to `adapters`.
template <class T>
Tensor gradients(
    const std::vector<Linear<T>>& layers, const Tensor& x, const Tensor& low, const std::vector<Tensor>& grads,
    std::vector<Tensor>& adapters) {
  const int64_t rows = x.size(0), size = x.size(1), ranks = low.size(1);
  const bool few = rows <= STREAMED_ROWS;
  const auto stream = DIFFMAS_KERNEL(project_streamed<T>);
  const auto outer = DIFFMAS_KERNEL(few_rows_outer<T>);
  const Tensor grad_x = new_tensor(x, {rows, size}, x.scalar_type());
  // What a part of a sum over a weight's rows adds to grad_x; cut alike whatever the number of threads.
  struct Part {
    size_t left;
    const Tensor* weight;
    int64_t begin, end;
  };
  std::vector<Rows<T>> lefts;
  lefts.reserve(2 * layers.size());
  std::vector<Part> parts;
  int64_t offset = 0, work = 0;
  const auto projection = [&](Rows<T>& left, T* y, int64_t stride, const Tensor& weight) {
    return Projection<T>{left.memory.data(), y,      rows, left.size, left.stride, stride,
                         static_cast<const T*>(weight.data_ptr()), weight.stride(0)};
  };
  const auto sum_over = [&](const Tensor& weight) {
    const int64_t height = (weight.size(0) / 16 + STREAMS) / STREAMS * STREAMS;
    for (int64_t begin = 0; begin < weight.size(0); begin += height)
      parts.push_back({lefts.size() - 1, &weight, begin, std::min(weight.size(0), begin + height)});
    work += rows * size * weight.size(0);
  };
  Tensor product = few || layers.size() < 2 ? grad_x : new_tensor(x, {rows, size}, x.scalar_type());
  for (size_t i = 0; i < layers.size(); ++i) {
    const Linear<T>& layer = layers[i];
    const int64_t rank = layer.rank();
    const T* part = static_cast<const T*>(low.data_ptr()) + offset;
    offset += rank;
    if (few) {
      lefts.push_back(read<T>(grads[i]));
      sum_over(layer.weight);
    } else {
      mm_out(i == 0 ? grad_x : product, grads[i], layer.weight);
      if (i > 0)
        in_rows(rows, rows * size, [&](int64_t begin, int64_t end) {
          const Matrix<T> to = matrix<T>(grad_x), from = matrix<T>(product);
          for (int64_t n = begin; n < end; ++n)
            for (int64_t d = 0; d < size; ++d) to.row(n)[d] += from.row(n)[d];
        });
    }
    if (rank == 0) continue;
    adapters.push_back(new_tensor(x, {rank, size}, x.scalar_type()));
    adapters.push_back(new_tensor(x, {layer.out(), rank}, x.scalar_type()));
    const Tensor &grad_a = adapters[adapters.size() - 2], &grad_b = adapters.back();
    if (few) {
      Rows<T>& grad = lefts.back();
      lefts.push_back(Rows<T>(rows, rank));
      Rows<T>& grad_low = lefts.back();
      stream(
          projection(grad, grad_low.memory.data(), grad_low.stride, layer.b), 0, layer.out(), rank,
          scratch<T>(projection_scratch(grad_low.stride)));
      for (int64_t j = 0; j < rows * grad_low.stride; ++j) grad_low.memory.data()[j] *= layer.scaling;
      sum_over(layer.a);
      outer({{grad_low.memory.data(), grad_low.stride}, matrix<const T>(x), matrix<T>(grad_a), rows, rank, size, T(1)});
      outer(
          {{grad.memory.data(), grad.stride}, {part, ranks}, matrix<T>(grad_b), rows, layer.out(), rank,
           layer.scaling});
      continue;
    }
    const Tensor grad_low = new_tensor(x, {rows, rank}, x.scalar_type());
    mm_out(grad_low, grads[i], layer.b);
    T* numbers = static_cast<T*>(grad_low.data_ptr());
    for (int64_t j = 0; j < rows * rank; ++j) numbers[j] *= layer.scaling;
    add_product<T>(grad_x, matrix<const T>(grad_low), rank, layer.a, false, T(1), nullptr);
    mm_out(grad_a, torch::stable::transpose(grad_low, 0, 1), x);
    Tensor lows = low;
    mm_out(grad_b, torch::stable::transpose(grads[i], 0, 1), torch::stable::narrow(lows, 1, offset - rank, rank));
    T* owed = static_cast<T*>(grad_b.data_ptr());
    for (int64_t j = 0; j < layer.out() * rank; ++j) owed[j] *= layer.scaling;
  }
  if (!few) return grad_x;
  Rows<T> sum(rows, size);
  const int64_t length = rows * sum.stride;
  Buffer<T> partial(parts.size() * length);
  parallel_tasks(parts.size(), work, [&](int64_t task) {
    const Part& part = parts[task];
    stream(
        projection(lefts[part.left], partial.data() + task * length, sum.stride, *part.weight), part.begin, part.end,
        size, scratch<T>(projection_scratch(sum.stride)));
  });
  std::fill_n(sum.memory.data(), length, T(0));
  for (size_t task = 0; task < parts.size(); ++task)
    for (int64_t j = 0; j < length; ++j) sum.memory.data()[j] += partial.data()[task * length + j];
  write<T>(sum, grad_x);
  return grad_x;
}

}  // namespace diffmas
