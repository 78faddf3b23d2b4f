// Copies of trace columns, with the optional change of type, rotation and accumulation.
#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

namespace {

template <class T>
void rotate_pair(T& a, T& b, T cos, T sin) {
  const T turned = a * cos - b * sin;
  b = b * cos + a * sin;
  a = turned;
}

}  // namespace

template <class S, class T>
void move_columns(const MoveColumns<S, T>& p, Acc<S>* row) {
  static_assert(std::is_same_v<Acc<S>, Acc<T>>);
  Acc<S>* current = row + padded<Acc<S>>(p.dim);
  for (int64_t i = 0; i < p.count; ++i) {
    T* target = p.target + i * p.target_stride;
    read_row(row, p.source + i * p.source_stride, p.dim);
    if (p.interleaved)
      for (int64_t d = 0; d < p.pairs; ++d) rotate_pair(row[2 * d], row[2 * d + 1], p.cos[d], p.sign * p.sin[d]);
    else
      for (int64_t d = 0; d < p.pairs; ++d) rotate_pair(row[d], row[d + p.pairs], p.cos[d], p.sign * p.sin[d]);
    if (p.add) {
      read_row(current, target, p.dim);
      for (int64_t d = 0; d < p.dim; ++d) row[d] += current[d];
    }
    write_row(target, row, p.dim);
  }
}

#define INSTANTIATE(S, T) template void move_columns<S, T>(const MoveColumns<S, T>&, Acc<S>*);
#define INSTANTIATE_FROM(S) INSTANTIATE(S, float) INSTANTIATE(S, BFloat16) INSTANTIATE(S, Half)
INSTANTIATE_FROM(float)
INSTANTIATE_FROM(BFloat16)
INSTANTIATE_FROM(Half)
INSTANTIATE(double, double)

}  // namespace DIFFMAS_ISA
}  // namespace diffmas
