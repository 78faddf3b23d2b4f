// A few rows in the accumulation type, and their product with a large weight.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace diffmas {

/// An [N, size] operand in the accumulation type, rows padded with zeros to whole vectors.
template <class A>
struct PaddedRows {
  PaddedRows(int64_t rows, int64_t size)
      : rows(rows), size(size), stride((size + PADDING - 1) / PADDING * PADDING), memory(rows * stride) {}

  A* row(int64_t i) { return memory.data() + i * stride; }

  int64_t rows, size, stride;
  Buffer<A> memory;
};

/// The first dimension's rows, whatever the others are.
template <class S>
PaddedRows<Acc<S>> read(const Tensor& tensor) {
  using A = Acc<S>;
  const int64_t rows = tensor.size(0);
  PaddedRows<A> result(rows, rows == 0 ? tensor.size(1) : tensor.numel() / rows);
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
void write(PaddedRows<Acc<S>>& rows, const Tensor& tensor) {
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

/// x @ weight [size, out], or x @ weightᵀ for weight [out, size].
template <class S>
PaddedRows<Acc<S>> multiply(PaddedRows<Acc<S>>& x, const Tensor& weight, bool transposed) {
  using A = Acc<S>;
  PaddedRows<A> y(x.rows, weight.size(transposed ? 0 : 1));
  const auto projection = [&](A* target) {
    return Projection<S>{
        x.memory.data(), target, x.rows, x.size, x.stride, y.stride, static_cast<const S*>(weight.data_ptr()),
        weight.stride(0)};
  };
  const int64_t work = x.rows * x.size * y.size, room = projection_scratch(std::max(x.stride, y.stride));
  if (!transposed && x.rows <= STREAMED_ROWS) {
    // A fixed number of parts, so that sums do not depend on the number of threads.
    const int64_t height = (x.size / 16 + STREAMS) / STREAMS * STREAMS, parts = (x.size + height - 1) / height;
    const int64_t length = x.rows * y.stride;
    Buffer<A> partial(parts * length);
    const auto kernel = DIFFMAS_KERNEL(project_streamed<S>);
    parallel_tasks(parts, work, [&](int64_t part) {
      const int64_t begin = part * height;
      kernel(
          projection(partial.data() + part * length), begin, std::min(x.size, begin + height), y.size,
          scratch<A>(room));
    });
    std::fill_n(y.memory.data(), length, A(0));
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < length; ++i) y.memory.data()[i] += partial.data()[part * length + i];
    return y;
  }
  const auto kernel = transposed ? DIFFMAS_KERNEL(project_transposed<S>) : DIFFMAS_KERNEL(project<S>);
  // Long stretches of a weight's rows stream well; a transposed product reads whole rows anyway.
  const int64_t width = transposed ? PROJECTION_ROWS : PROJECTION_COLUMNS;
  parallel_tasks((y.size + width - 1) / width, work, [&](int64_t task) {
    kernel(projection(y.memory.data()), task * width, std::min(y.size, (task + 1) * width), scratch<A>(room));
  });
  return y;
}

}  // namespace diffmas
