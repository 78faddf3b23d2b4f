// Linear layers with low-rank adapters for a few rows: bound by the reading of the weights, which is done once, in one
// parallel region for all layers of an input.
#pragma once

#include "cpu/few_rows.h"

namespace diffmas {

template <class T>
Matrix<T> matrix(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data_ptr()), tensor.stride(0)};
}

/// y = x Wᵀ + bias + s (x Aᵀ) Bᵀ with x [N, in], W [out, in], A [r, in], B [out, r]; r = 0 and no bias are allowed.
template <class T>
struct Linear {
  Tensor weight, a, b;
  const T* bias;  // or null
  T scaling;

  int64_t in() const { return weight.size(1); }
  int64_t out() const { return weight.size(0); }
  int64_t rank() const { return a.size(0); }
};

/// Weight rows of one task: few enough to share, enough to read in long stretches.
constexpr int64_t ROWS_TOGETHER = 128;

/// Work on the adapter of one layer, or on weight rows [begin, end) of it.
struct LayerTask {
  size_t layer;
  bool adapter;
  int64_t begin, end;
};

/// All work on `layers`, cut alike whatever the number of threads: `height(layer)` weight rows together.
template <class T, class Height>
std::vector<LayerTask> layer_tasks(const std::vector<Linear<T>>& layers, const Height& height) {
  std::vector<LayerTask> tasks;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i].rank() > 0 || layers[i].bias != nullptr) tasks.push_back({i, true, 0, 0});
    const int64_t out = layers[i].out(), step = height(layers[i]);
    for (int64_t begin = 0; begin < out; begin += step) tasks.push_back({i, false, begin, std::min(out, begin + step)});
  }
  return tasks;
}

template <class T>
int64_t multiplications(const std::vector<Linear<T>>& layers, int64_t rows, int64_t size) {
  int64_t count = 0;
  for (const auto& layer : layers) count += rows * (size + layer.rank()) * layer.out();
  return count;
}

/// Offsets of the layers' parts of a dimension that they share, and the dimension's size behind them.
template <class T, class Size>
std::vector<int64_t> offsets(const std::vector<Linear<T>>& layers, const Size& size) {
  std::vector<int64_t> result{0};
  for (const auto& layer : layers) result.push_back(result.back() + size(layer));
  return result;
}

/// Writes the outputs of the layers for `x`, and their x Aᵀ side by side into `low`.
template <class T>
void apply_few(
    const std::vector<Linear<T>>& layers, const Tensor& x, const Tensor& low, const std::vector<Tensor>& outs) {
  const int64_t rows = x.size(0), size = layers.front().in(), ranks = low.size(1);
  const auto dot = DIFFMAS_KERNEL(project_transposed<T>);
  const auto adapter = DIFFMAS_KERNEL(few_rows_adapter<T>);
  PaddedRows<T> input = read<T>(x);
  const auto product = [&](T* y, int64_t stride, const Tensor& weight, int64_t begin, int64_t end) {
    const Projection<T> projection{
        input.memory.data(), y, rows, size, input.stride, stride, static_cast<const T*>(weight.data_ptr()),
        weight.stride(0)};
    dot(projection, begin, end, scratch<T>(projection_scratch(input.stride)));
  };
  const auto rank_of = offsets(layers, [](const Linear<T>& layer) { return layer.rank(); });
  const auto out_of = offsets(layers, [&](const Linear<T>& layer) { return rows * layer.out(); });
  const auto tasks = layer_tasks(layers, [](const Linear<T>&) { return ROWS_TOGETHER; });
  Buffer<T> added(out_of.back());
  parallel_tasks(tasks.size(), multiplications(layers, rows, size), [&](int64_t i) {
    const LayerTask& task = tasks[i];
    const Linear<T>& layer = layers[task.layer];
    const Matrix<T> y = matrix<T>(outs[task.layer]);
    if (!task.adapter) return product(y.data, y.stride, layer.weight, task.begin, task.end);
    const Matrix<T> part{static_cast<T*>(low.data_ptr()) + rank_of[task.layer], ranks};
    product(part.data, ranks, layer.a, 0, layer.rank());
    adapter(
        {{part.data, ranks},
         matrix<const T>(layer.b),
         {},
         layer.bias,
         {added.data() + out_of[task.layer], layer.out()},
         {},
         {},
         rows,
         layer.out(),
         layer.rank(),
         layer.scaling},
        scratch<T>(layer.rank() + PADDING));
  });
  for (const LayerTask& task : tasks) {
    if (!task.adapter) continue;
    const Matrix<T> y = matrix<T>(outs[task.layer]);
    const int64_t out = layers[task.layer].out();
    const T* more = added.data() + out_of[task.layer];
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t j = 0; j < out; ++j) y.row(n)[j] += more[n * out + j];
  }
}

/// Writes the gradient of `x` from those of the outputs, and those of A and B of each layer that has them.
template <class T>
void gradients_few(
    const std::vector<Linear<T>>& layers, const Tensor& x, const Tensor& low, const std::vector<Tensor>& grads,
    const Tensor& grad_x, const Tensor* of_adapters) {
  const int64_t rows = x.size(0), size = layers.front().in(), ranks = low.size(1);
  const auto stream = DIFFMAS_KERNEL(project_streamed<T>);
  const auto outer = DIFFMAS_KERNEL(few_rows_outer<T>);
  const auto adapter = DIFFMAS_KERNEL(few_rows_adapter_gradient<T>);
  const auto rank_of = offsets(layers, [](const Linear<T>& layer) { return layer.rank(); });
  const auto adapters_before = offsets(layers, [](const Linear<T>& layer) { return layer.rank() > 0 ? 2 : 0; });
  const auto tasks =
      layer_tasks(layers, [](const Linear<T>& layer) { return (layer.out() / 16 + STREAMS) / STREAMS * STREAMS; });
  std::vector<PaddedRows<T>> lefts;
  for (const Tensor& grad : grads) lefts.push_back(read<T>(grad));
  PaddedRows<T> sum(rows, size);
  const int64_t length = rows * sum.stride;
  // What a task adds to the gradient of x.
  Buffer<T> parts(tasks.size() * length);
  parallel_tasks(tasks.size(), multiplications(layers, rows, size), [&](int64_t i) {
    const LayerTask& task = tasks[i];
    const Linear<T>& layer = layers[task.layer];
    const int64_t rank = layer.rank();
    PaddedRows<T>& grad = lefts[task.layer];
    T* part = parts.data() + i * length;
    const auto product = [&](PaddedRows<T>& left, const Tensor& weight, int64_t begin, int64_t end) {
      const Projection<T> projection{
          left.memory.data(), part, rows, left.size, left.stride, sum.stride, static_cast<const T*>(weight.data_ptr()),
          weight.stride(0)};
      stream(projection, begin, end, size, scratch<T>(projection_scratch(sum.stride)));
    };
    if (!task.adapter) return product(grad, layer.weight, task.begin, task.end);
    if (rank == 0) return std::fill_n(part, length, T(0)), void();
    PaddedRows<T> grad_low(rows, rank);
    const Tensor* grads_ab = of_adapters + adapters_before[task.layer];
    adapter(
        {{static_cast<const T*>(low.data_ptr()) + rank_of[task.layer], ranks},
         matrix<const T>(layer.b),
         {grad.memory.data(), grad.stride},
         nullptr,
         {},
         {grad_low.memory.data(), grad_low.stride},
         matrix<T>(grads_ab[1]),
         rows,
         layer.out(),
         rank,
         layer.scaling},
        scratch<T>(4 * rank));
    outer(
        {{grad_low.memory.data(), grad_low.stride},
         matrix<const T>(x),
         matrix<T>(grads_ab[0]),
         rows,
         rank,
         size,
         T(1)});
    product(grad_low, layer.a, 0, rank);
  });
  std::fill_n(sum.memory.data(), length, T(0));
  for (size_t task = 0; task < tasks.size(); ++task)
    for (int64_t j = 0; j < length; ++j) sum.memory.data()[j] += parts.data()[task * length + j];
  write<T>(sum, grad_x);
}

}  // namespace diffmas
