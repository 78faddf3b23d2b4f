// Products of a few rows with a large weight, which leaves memory once for every PROJECTION_ROWS of them.
#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

/// y[:, begin .. end) = x @ weight[:, begin .. end)
template <class S>
void project(const Projection<S>& p, int64_t begin, int64_t end, Acc<S>* scratch) {
  using T = Acc<S>;
  const int64_t width = end - begin, stride = padded<T>(width);
  Pieces<T> pieces(scratch);
  T* spare = pieces.take(PROJECTION_ROWS * stride);
  T* y = pieces.take(PROJECTION_ROWS * stride);
  for (int64_t first = 0; first < p.rows; first += PROJECTION_ROWS) {
    const int64_t rows = smaller(PROJECTION_ROWS, p.rows - first);
    fill(y, rows * stride, T(0));
    for (int64_t k = 0; k < p.size; k += PROJECTION_ROWS) {
      const int64_t count = smaller(PROJECTION_ROWS, p.size - k);
      const S* weight = p.weight + k * p.weight_stride + begin;
      in_vectors(weight, p.weight_stride, count, width, spare, [&](const auto* weight_rows, int64_t weight_stride) {
        product<Into::Add, Left::RowMajor>(
            rows, stride, y, stride, p.x + first * p.x_stride + k, p.x_stride, weight_rows, weight_stride, count);
      });
    }
    for (int64_t r = 0; r < rows; ++r) write_row(p.y + (first + r) * p.y_stride + begin, y + r * stride, width);
  }
}

/// y = x[:, begin .. end) @ weight[begin .. end, :), `width` columns wide: a part of the sum, from whole weight rows.
template <class S>
void project_streamed(const Projection<S>& p, int64_t begin, int64_t end, int64_t width, Acc<S>* scratch) {
  using T = Acc<S>;
  fill(p.y, p.rows * p.y_stride, T(0));
  for (int64_t k = begin; k < end; k += STREAMS) {
    const int64_t count = smaller(STREAMS, end - k);
    const S* weight = p.weight + k * p.weight_stride;
    in_vectors(weight, p.weight_stride, count, width, scratch, [&](const auto* weight_rows, int64_t weight_stride) {
      streamed_product<Into::Add, Left::RowMajor>(
          p.rows, padded<T>(width), p.y, p.y_stride, p.x + k, p.x_stride, weight_rows, weight_stride, count);
    });
  }
}

/// y[:, begin .. end) = x @ weight[begin .. end, :]ᵀ
template <class S>
void project_transposed(const Projection<S>& p, int64_t begin, int64_t end, Acc<S>* scratch) {
  constexpr int64_t together = 4;
  using T = Acc<S>;
  for (int64_t j = begin; j < end; j += together) {
    const int64_t count = smaller(together, end - j);
    const S* weight = p.weight + j * p.weight_stride;
    in_vectors(weight, p.weight_stride, count, p.size, scratch, [&](const auto* weight_rows, int64_t weight_stride) {
      dots(p.rows, count, p.y + j, p.y_stride, p.x, p.x_stride, weight_rows, weight_stride, padded<T>(p.size));
    });
  }
}

/// grad[begin .. end, :] = x[:, begin .. end)ᵀ @ y
template <class T>
void outer_product(const OuterProduct<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t rows = end - begin, whole = p.size / W<T> * W<T>, rest = p.size - whole;
  T* grad = p.grad + begin * p.size;
  product<Into::Overwrite, Left::ColumnMajor>(rows, whole, grad, p.size, p.x + begin, p.stride, p.y, p.stride, p.rows);
  if (rest == 0) return;
  panel<Into::Overwrite, Left::ColumnMajor, 1>(
      rows, scratch, W<T>, p.x + begin, p.stride, p.y + whole, p.stride, p.rows);
  for (int64_t i = 0; i < rows; ++i) write_row(grad + i * p.size + whole, scratch + i * W<T>, rest);
}

#define INSTANTIATE(S)                                                                         \
  template void project<S>(const Projection<S>&, int64_t, int64_t, Acc<S>*);                   \
  template void project_streamed<S>(const Projection<S>&, int64_t, int64_t, int64_t, Acc<S>*); \
  template void project_transposed<S>(const Projection<S>&, int64_t, int64_t, Acc<S>*);
DIFFMAS_FOR_STORAGE_TYPES(INSTANTIATE)
template void outer_product<float>(const OuterProduct<float>&, int64_t, int64_t, float*);
template void outer_product<double>(const OuterProduct<double>&, int64_t, int64_t, double*);

}  // namespace DIFFMAS_ISA
}  // namespace diffmas
