// Linear layers with low-rank adapters (LoRA, arXiv 2106.09685): forward and backward. A few rows read every weight
// once, as it lies; more go by dense products in pieces.
#pragma once

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

/// `x [rows, ...]` as a matrix; few rows are read by their stride alone.
inline Tensor as_matrix(const Tensor& x) {
  if (x.dim() == 2 || x.size(0) <= STREAMED_ROWS) return x;
  const int64_t sizes[] = {x.size(0), x.numel() / x.size(0)};
  return torch::stable::view(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2));
}

/// A part of a matrix in memory, which may stand transposed.
template <class T>
struct Block {
  T* data;
  int64_t rows, columns, stride;
  bool transposed = false;

  Block flipped() const { return {data, columns, rows, stride, !transposed}; }
};

template <class T>
Block<T> block(const Tensor& x, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return {static_cast<T*>(x.data_ptr()) + row * x.stride(0) + column, rows, columns, x.stride(0)};
}

/// c = a b, or c += a b; c does not stand transposed.
template <class T>
void multiply(const Block<T>& c, const Block<const T>& a, const Block<const T>& b, bool add = false) {
  const DenseProduct<T> product{c.data, a.data,    b.data,    c.stride,     a.stride,     b.stride,
                                c.rows, c.columns, a.columns, a.transposed, b.transposed, add};
  DIFFMAS_KERNEL(dense_product<T>)(product, scratch<T>(dense_scratch(c.rows)));
}

template <class T>
void scale(const Block<T>& x, T factor) {
  for (int64_t n = 0; n < x.rows; ++n)
    for (int64_t j = 0; j < x.columns; ++j) x.data[n * x.stride + j] *= factor;
}

/// Rows and columns of a result that one thread computes, in order.
struct Piece {
  size_t layer;
  int64_t row, rows, column, columns;
};

/// Columns of a piece.
constexpr int64_t COLUMNS_TOGETHER = 256;

/// Appends the pieces of a result of `layer`, cut alike whatever the number of threads: many rows together, since each
/// piece packs its part of the weight anew, but no more than L2 holds of the input.
inline void cut(std::vector<Piece>& pieces, size_t layer, int64_t rows, int64_t columns) {
  const int64_t height = std::clamp<int64_t>((rows / 4 + 15) / 16 * 16, 64, 256);
  for (int64_t column = 0; column < columns; column += COLUMNS_TOGETHER)
    for (int64_t row = 0; row < rows; row += height)
      pieces.push_back(
          {layer, row, std::min(height, rows - row), column, std::min(COLUMNS_TOGETHER, columns - column)});
}

/// y += bias + scaling low b, for a block of a layer's result.
template <class T>
void add_product(const Block<T>& y, const Block<const T>& low, const Block<const T>& b, T scaling, const T* bias) {
  const LowRank<T> product{
      {y.data, y.stride}, {low.data, low.stride}, {b.data, b.stride}, bias, y.rows, y.columns, low.columns, scaling,
      b.transposed};
  DIFFMAS_KERNEL(add_low_rank<T>)(product, 0, y.rows, scratch<T>(low.columns * (y.columns + PADDING)));
}

/// Writes factor * left(layer) right(layer), the layers' side by side, into `low`: x Aᵀ, or grad B.
template <class T, class Left, class Right, class Factor>
void multiply_low(
    const std::vector<Linear<T>>& layers, const Tensor& low, int64_t work, const Left& left, const Right& right,
    const Factor& factor) {
  const auto rank_of = offsets(layers, [](const Linear<T>& layer) { return layer.rank(); });
  std::vector<Piece> pieces;
  for (size_t i = 0; i < layers.size(); ++i)
    if (layers[i].rank() > 0) cut(pieces, i, low.size(0), layers[i].rank());
  parallel_tasks(pieces.size(), work, [&](int64_t task) {
    const Piece& piece = pieces[task];
    const Tensor& from = left(piece.layer);
    const Block<const T> b = right(layers[piece.layer]);
    const Block<T> part = block<T>(low, piece.row, piece.rows, rank_of[piece.layer] + piece.column, piece.columns);
    multiply<T>(
        part, block<const T>(from, piece.row, piece.rows, 0, b.rows),
        {b.data + piece.column * (b.transposed ? b.stride : 1), b.rows, piece.columns, b.stride, b.transposed});
    if (const T by = factor(layers[piece.layer]); by != T(1)) scale(part, by);
  });
}

template <class T>
int64_t low_multiplications(const std::vector<Linear<T>>& layers, int64_t rows, bool inputs) {
  int64_t count = 0;
  for (const auto& layer : layers) count += rows * layer.rank() * (inputs ? layer.in() : layer.out());
  return count;
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
  multiply_low<T>(
      layers, low, low_multiplications(layers, rows, true), [&](size_t) -> const Tensor& { return x; },
      [&](const Linear<T>& layer) { return block<const T>(layer.a, 0, layer.rank(), 0, size).flipped(); },
      [](const Linear<T>&) { return T(1); });
  std::vector<Piece> pieces;
  for (size_t i = 0; i < layers.size(); ++i) cut(pieces, i, rows, layers[i].out());
  parallel_tasks(pieces.size(), multiplications(layers, rows, size), [&](int64_t task) {
    const Piece& piece = pieces[task];
    const Linear<T>& layer = layers[piece.layer];
    const int64_t rank = layer.rank();
    const Block<T> y = block<T>(outs[piece.layer], piece.row, piece.rows, piece.column, piece.columns);
    multiply<T>(
        y, block<const T>(x, piece.row, piece.rows, 0, size),
        block<const T>(layer.weight, piece.column, piece.columns, 0, size).flipped());
    if (rank == 0 && layer.bias == nullptr) return;
    add_product<T>(
        y, block<const T>(low, piece.row, piece.rows, rank_of[piece.layer], rank),
        block<const T>(layer.b, piece.column, piece.columns, 0, rank).flipped(), layer.scaling,
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
          block<T>(target, 0, rank, task.begin, task.count), block<const T>(grad_low, 0, rows, offset, rank).flipped(),
          block<const T>(x, 0, rows, task.begin, task.count));
      return;
    }
    const Block<T> grad_b = block<T>(target, task.begin, task.count, 0, rank);
    multiply<T>(
        grad_b, block<const T>(grads[task.layer], 0, rows, task.begin, task.count).flipped(),
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
  multiply_low<T>(
      layers, grad_low, low_multiplications(layers, rows, false), [&](size_t i) -> const Tensor& { return grads[i]; },
      [](const Linear<T>& layer) { return block<const T>(layer.b, 0, layer.out(), 0, layer.rank()); },
      [](const Linear<T>& layer) { return layer.scaling; });
  std::vector<Piece> pieces;
  cut(pieces, 0, rows, size);
  parallel_tasks(pieces.size(), multiplications(layers, rows, size), [&](int64_t task) {
    const Piece& piece = pieces[task];
    const Block<T> sum = block<T>(grad_x, piece.row, piece.rows, piece.column, piece.columns);
    for (size_t i = 0; i < layers.size(); ++i) {
      const Linear<T>& layer = layers[i];
      const int64_t out = layer.out(), rank = layer.rank();
      multiply<T>(
          sum, block<const T>(grads[i], piece.row, piece.rows, 0, out),
          block<const T>(layer.weight, 0, out, piece.column, piece.columns), i > 0);
      if (rank > 0)
        add_product<T>(
            sum, block<const T>(grad_low, piece.row, piece.rows, rank_of[i], rank),
            block<const T>(layer.a, 0, rank, piece.column, piece.columns), T(1), nullptr);
    }
  });
  if (adapters.size() > first) adapter_gradients(layers, x, low, grads, grad_low, adapters.data() + first);
  return grad_x;
}

}  // namespace diffmas
