// Merge of partial attention results, each with its log-sum-exp.
#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

template <class S, class Out>
void merge_row(const MergeRow<S, Out>& p, Acc<S>* scratch) {
  using T = Acc<S>;
  T top = -infinity<T>();
  for (int64_t s = 0; s < p.splits; ++s) {
    const T lse = p.lses[s * p.lse_stride];
    // Written so that a NaN stays, and the result is NaN.
    top = lse <= top ? top : lse;
  }
  T total = 0;
  for (int64_t s = 0; s < p.splits; ++s) {
    const T lse = p.lses[s * p.lse_stride];
    if (lse != -infinity<T>()) total += exponential(splat(lse - top))[0];
  }
  const T lse = top == -infinity<T>() ? top : top + logarithm(total);
  *p.lse = lse;

  const int64_t stride = padded<T>(p.dim);
  T* part = scratch + stride;
  fill(scratch, stride, T(0));
  for (int64_t s = 0; s < p.splits; ++s) {
    if (p.lses[s * p.lse_stride] == -infinity<T>()) continue;
    const T weight = exponential(splat(p.lses[s * p.lse_stride] - lse))[0];
    if (weight == 0) continue;
    read_row(part, p.outs + s * p.out_stride, p.dim, weight);
    for (int64_t d = 0; d < stride; d += W<T>) store(scratch + d, load(scratch + d) + load(part + d));
  }
  write_row(p.out, scratch, p.dim);
}

#define INSTANTIATE(S, Out) template void merge_row<S, Out>(const MergeRow<S, Out>&, Acc<S>*);
INSTANTIATE(float, float)
INSTANTIATE(float, BFloat16)
INSTANTIATE(float, Half)
INSTANTIATE(double, double)
INSTANTIATE(BFloat16, BFloat16)
INSTANTIATE(Half, Half)

}  // namespace DIFFMAS_ISA
}  // namespace diffmas
