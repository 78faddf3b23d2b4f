"""`few_rows_matmul` in plain PyTorch: the specification, any dtype, any device."""

from torch import Tensor


def few_rows_matmul(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """`x [N, in] @ weight [in, out]`, or `x @ weightᵀ` for `weight [out, in]`, in the dtype of `x`."""
    return x @ (weight.T if transposed else weight)
