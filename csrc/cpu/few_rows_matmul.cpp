#include <torch/csrc/stable/library.h>

#include "cpu/few_rows.h"

namespace diffmas {

Tensor few_rows_matmul(const Tensor& x, const Tensor& weight, bool transposed) {
  check_few_rows(x, weight, transposed);
  const Tensor y = new_tensor(x, {x.size(0), weight.size(transposed ? 0 : 1)}, x.scalar_type());
  with_storage_type("x", x.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    PaddedRows<Acc<S>> rows = read<S>(x);
    PaddedRows<Acc<S>> product = multiply<S>(rows, weight, transposed);
    write<S>(product, y);
  });
  return y;
}

}  // namespace diffmas

// Here and not in bindings.cpp, which other devices' builds share: this operator is the CPU's alone.
STABLE_TORCH_LIBRARY_IMPL(diffmas, CPU, m) { m.impl("few_rows_matmul", TORCH_BOX(&diffmas::few_rows_matmul)); }
