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

/// A matrix in memory, any way round.
template <class T>
struct Block {
  T* data;
  int64_t rows, columns, row_stride, column_stride;

  Block transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

template <class T>
Block<T> block(const Tensor& x, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return {static_cast<T*>(x.data_ptr()) + row * x.stride(0) + column, rows, columns, x.stride(0), 1};
}

/// A tensor without a history: threads of a parallel region do not know whether their caller records gradients.
template <class T>
Tensor as_tensor(const Block<T>& block) {
  const int64_t sizes[] = {block.rows, block.columns}, strides[] = {block.row_stride, block.column_stride};
  const int32_t dtype = sizeof(T) == sizeof(float) ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<std::remove_const_t<T>*>(block.data), 2, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), 0,
      &handle));
  return Tensor(handle);
}

/// c = a b, by PyTorch's matrix product.
template <class T>
void multiply(const Block<T>& c, const Block<const T>& a, const Block<const T>& b) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(as_tensor(a)), torch::stable::detail::from(as_tensor(b)),
      torch::stable::detail::from(as_tensor(c))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

template <class T>
void scale(const Block<T>& x, T factor) {
  for (int64_t n = 0; n < x.rows; ++n)
    for (int64_t j = 0; j < x.columns; ++j) x.data[n * x.row_stride + j] *= factor;
}

/// Rows and columns of a result that one thread computes, in order.
struct Piece {
  int64_t layer, row, rows, column, columns;
};

/// Columns of one piece where there are too few rows to share.
constexpr int64_t COLUMNS_TOGETHER = 512;

/// Appends the pieces of a result of `layer`, cut alike whatever the number of threads: rows go together as far as
/// that leaves enough pieces, since each reads the whole weight.
inline void cut(std::vector<Piece>& pieces, int64_t layer, int64_t rows, int64_t columns) {
  const int64_t height = std::clamp<int64_t>((rows / 32 + 15) / 16 * 16, 64, 256);
  const int64_t width = rows > 4 * height ? columns : COLUMNS_TOGETHER;
  for (int64_t column = 0; column < columns; column += width)
    for (int64_t row = 0; row < rows; row += height)
      pieces.push_back({layer, row, std::min(height, rows - row), column, std::min(width, columns - column)});
}

/// y += bias + scaling low b, for a block of a layer's result; b may stand transposed.
template <class T>
void add_product(
    const Block<T>& y, const Block<T>& low, const Block<const T>& b, bool transposed, T scaling, const T* bias) {
  const int64_t rank = low.columns;
  const LowRank<T> product{
      {y.data, y.row_stride},
      {low.data, low.row_stride},
      {b.data, b.row_stride},
      bias,
      y.rows,
      y.columns,
      rank,
      scaling,
      transposed};
  const auto kernel = DIFFMAS_KERNEL(add_low_rank<T>);
  kernel(product, 0, y.rows, scratch<T>(rank * (y.columns + PADDING)));
}

/// Rows of x Aᵀ or grad B: those of `whole` itself for the first columns, a copy in `memory` for others, so that no
/// thread waits for another.
template <class T>
Block<T> low_rows(const Tensor& whole, int64_t offset, int64_t rank, const Piece& piece, Buffer<T>& memory) {
  if (piece.column == 0) return block<T>(whole, piece.row, piece.rows, offset, rank);
  memory = Buffer<T>(piece.rows * rank);
  return {memory.data(), piece.rows, rank, rank, 1};
}

/// Layers of one input: writes their outputs, and returns their x Aᵀ side by side.
template <class T>
Tensor apply(const std::vector<Linear<T>>& layers, const Tensor& x, const std::vector<Tensor>& outs) {
  const auto rank_of = offsets(layers, [](const Linear<T>& layer) { return layer.rank(); });
  const int64_t rows = x.size(0), size = layers.front().in();
  const Tensor low = new_tensor(x, {rows, rank_of.back()}, x.scalar_type());
  if (rows <= STREAMED_ROWS) {
    apply_few(layers, x, low, outs);
    return low;
  }
  std::vector<Piece> pieces;
  for (size_t i = 0; i < layers.size(); ++i) cut(pieces, i, rows, layers[i].out());
  parallel_tasks(pieces.size(), multiplications(layers, rows, size), [&](int64_t i) {
    const Piece& piece = pieces[i];
    const Linear<T>& layer = layers[piece.layer];
    const int64_t rank = layer.rank();
    const Block<const T> from = block<const T>(x, piece.row, piece.rows, 0, size);
    const Block<T> y = block<T>(outs[piece.layer], piece.row, piece.rows, piece.column, piece.columns);
    multiply<T>(y, from, block<const T>(layer.weight, piece.column, piece.columns, 0, size).transposed());
    if (rank == 0 && layer.bias == nullptr) return;
    Buffer<T> memory;
    const Block<T> part = low_rows(low, rank_of[piece.layer], rank, piece, memory);
    if (rank > 0) multiply<T>(part, from, block<const T>(layer.a, 0, rank, 0, size).transposed());
    add_product<T>(
        y, part, block<const T>(layer.b, piece.column, piece.columns, 0, rank), true, layer.scaling,
        layer.bias == nullptr ? nullptr : layer.bias + piece.column);
  });
  return low;
}

/// Writes the gradients of A = (grad B)ᵀ x and of B = scaling gradᵀ (x Aᵀ), in stretches of what is not the rank.
template <class T>
void adapter_gradients(
    const std::vector<Linear<T>>& layers, const Tensor& x, const Tensor& low, const std::vector<Tensor>& grads,
    const Tensor& grad_low, const Tensor* of_adapters) {
  struct Task {
    size_t layer, place;
    bool a;
    int64_t begin, count;
  };
  const auto rank_of = offsets(layers, [](const Linear<T>& layer) { return layer.rank(); });
  const int64_t rows = x.size(0);
  int64_t work = 0;
  std::vector<Task> tasks;
  size_t place = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].rank() == 0) continue;
    for (const bool a : {true, false}) {
      const int64_t size = a ? layers[i].in() : layers[i].out();
      for (int64_t begin = 0; begin < size; begin += COLUMNS_TOGETHER)
        tasks.push_back({i, place, a, begin, std::min(COLUMNS_TOGETHER, size - begin)});
      work += rows * size * layers[i].rank();
      ++place;
    }
  }
  parallel_tasks(tasks.size(), work, [&](int64_t i) {
    const Task& task = tasks[i];
    const int64_t rank = layers[task.layer].rank(), offset = rank_of[task.layer];
    const Tensor& target = of_adapters[task.place];
    if (task.a) {
      multiply<T>(
          block<T>(target, 0, rank, task.begin, task.count),
          block<const T>(grad_low, 0, rows, offset, rank).transposed(),
          block<const T>(x, 0, rows, task.begin, task.count));
      return;
    }
    const Block<T> grad_b = block<T>(target, task.begin, task.count, 0, rank);
    multiply<T>(
        grad_b, block<const T>(grads[task.layer], 0, rows, task.begin, task.count).transposed(),
        block<const T>(low, 0, rows, offset, rank));
    scale(grad_b, layers[task.layer].scaling);
  });
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
  const auto rank_of = offsets(layers, [](const Linear<T>& layer) { return layer.rank(); });
  const Tensor grad_low = new_tensor(x, {rows, rank_of.back()}, x.scalar_type());
  const int64_t work = multiplications(layers, rows, size);
  std::vector<Piece> pieces;
  cut(pieces, 0, rows, size);
  parallel_tasks(pieces.size(), work, [&](int64_t task) {
    const Piece& piece = pieces[task];
    const Block<T> sum = block<T>(grad_x, piece.row, piece.rows, piece.column, piece.columns);
    Buffer<T> term(layers.size() < 2 ? 0 : piece.rows * piece.columns), memory;
    for (size_t i = 0; i < layers.size(); ++i) {
      const Linear<T>& layer = layers[i];
      const int64_t out = layer.out(), rank = layer.rank();
      const Block<const T> grad = block<const T>(grads[i], piece.row, piece.rows, 0, out);
      const Block<const T> weight = block<const T>(layer.weight, 0, out, piece.column, piece.columns);
      if (i == 0) {
        multiply<T>(sum, grad, weight);
      } else {
        multiply<T>({term.data(), piece.rows, piece.columns, piece.columns, 1}, grad, weight);
        for (int64_t n = 0; n < piece.rows; ++n)
          for (int64_t d = 0; d < piece.columns; ++d)
            sum.data[n * sum.row_stride + d] += term.data()[n * piece.columns + d];
      }
      if (rank == 0) continue;
      const Block<T> part = low_rows(grad_low, rank_of[i], rank, piece, memory);
      multiply<T>(part, grad, block<const T>(layer.b, 0, out, 0, rank));
      scale(part, layer.scaling);
      add_product<T>(sum, part, block<const T>(layer.a, 0, rank, piece.column, piece.columns), false, T(1), nullptr);
    }
  });
  if (adapters.size() > first) adapter_gradients(layers, x, low, grads, grad_low, adapters.data() + first);
  return grad_x;
}

}  // namespace diffmas
