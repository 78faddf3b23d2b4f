"""Product of a few rows with a large weight, bound by reading the weight once."""

from __future__ import annotations

from torch import Tensor

from diffmas_ops import backends

# Up to here the compiled CPU kernels stream the weight; above, a matrix product is bound by arithmetic.
_FEW = 16


def few_rows_matmul(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """`x [N, in] @ weight [in, out]`, or `x @ weightᵀ` for `weight [out, in]`; meant for latent steps. No autograd.

    PyTorch's product of one row with a matrix runs on one thread and below the memory's bandwidth on the CPU; up to
    16 rows take the compiled operator there. Everything else is PyTorch's own product.
    """
    if x.device.type == "cpu" and x.shape[0] <= _FEW and x.stride(1) == weight.stride(1) == 1:
        return backends.functions("few_rows_matmul", x).few_rows_matmul(x, weight, transposed)
    return x @ (weight.T if transposed else weight)
