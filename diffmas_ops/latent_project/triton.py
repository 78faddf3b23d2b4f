"""`latent_project` and its backward in Triton: a weight-streaming split-K product and a per-row rescale.

The inner dimension is split over programs because a few rows alone would not fill a GPU; the partial products are
added in a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.triton_device import LAUNCH_OPTIONS, launch_on, multiprocessors

_BLOCK_N, _BLOCK_K = 64, 64


@triton.jit(do_not_specialize=["m", "k", "k_part"])
def _partial_product(
    a, b, out, m, n, k, k_part, a_m, a_k, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """`out[s] = a[:, part s] @ b[part s]`, `out [S, m, n]` contiguous."""
    rows = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    cols = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    part = tl.program_id(2)
    first = part * k_part
    last = tl.minimum(k, first + k_part)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(first, last, BLOCK_K):
        inner = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        down, across = inner[:, None], inner[None, :]
        left = tl.load(a + rows * a_m + across * a_k, mask=(rows < m) & (across < last), other=0.0)
        right = tl.load(b + down * b_k + cols * b_n, mask=(down < last) & (cols < n), other=0.0)
        if MIXED:
            # A 16-bit operand is exact in TensorFloat-32; three products carry the other to float32 accuracy.
            total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="tf32x3")
        else:
            total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(out + (part.to(tl.int64) * m + rows) * n + cols, total, mask=(rows < m) & (cols < n))


@triton.jit(do_not_specialize=["parts"])
def _rescale(products, out, norm, size, parts, products_s, products_m, target_norm, BLOCK: tl.constexpr):
    """`out = target_norm * y / ‖y‖` of `y = Σ_s products[s]`, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    products += row * products_m + h
    for _ in range(parts):
        y += tl.load(products, mask=h < size, other=0.0).to(tl.float32)
        products += products_s
    length = tl.sqrt(tl.sum(y * y))
    scale = target_norm / tl.where(length > 0, length, 1.0)
    tl.store(out + row * size + h, (y * scale).to(out.dtype.element_ty), mask=h < size)
    tl.store(norm + row, length)


@triton.jit
def _rescale_backward(grad_out, out, norm, grad_y, size, grad_m, out_m, target_norm, BLOCK: tl.constexpr):
    """`grad_y = target_norm / ‖y‖ * (grad_out - u (u · grad_out))` with `u = y / ‖y‖`, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    grad = tl.load(grad_out + row * grad_m + h, mask=h < size, other=0.0).to(tl.float32)
    unit = tl.load(out + row * out_m + h, mask=h < size, other=0.0).to(tl.float32) / target_norm
    length = tl.load(norm + row)
    scale = tl.where(length > 0, target_norm, 0.0) / tl.where(length > 0, length, 1.0)
    grad = (grad - unit * tl.sum(unit * grad)) * scale
    tl.store(grad_y + row * size + h, grad.to(grad_y.dtype.element_ty), mask=h < size)


def latent_project(hidden: Tensor, weight: Tensor | None, target_norm: float) -> tuple[Tensor, Tensor]:
    """See `reference.latent_project`."""
    rows, size = hidden.shape
    products = hidden.unsqueeze(0) if weight is None else _product(hidden, weight)
    out = hidden.new_empty(rows, size)
    norm = hidden.new_empty(rows, dtype=accumulation_dtype(hidden.dtype))
    with launch_on(hidden):
        _rescale[(rows,)](
            products, out, norm, size, len(products), *products.stride()[:2], target_norm,
            BLOCK=triton.next_power_of_2(size), num_warps=8, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out, norm


def latent_project_backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    out: Tensor,
    norm: Tensor,
    target_norm: float,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.latent_project_backward`."""
    rows, size = hidden.shape
    acc = accumulation_dtype(hidden.dtype)
    grad_y = hidden.new_empty(rows, size, dtype=hidden.dtype if weight is None else acc)
    with launch_on(hidden):
        _rescale_backward[(rows,)](
            grad_out, out, norm, grad_y, size, grad_out.stride(0), out.stride(0), target_norm,
            BLOCK=triton.next_power_of_2(size), num_warps=8, **LAUNCH_OPTIONS,
        )  # fmt: skip
    nothing = norm.new_empty(0)
    if weight is None:
        return grad_y, nothing
    grad_hidden = _product(grad_y, weight.T).sum(0).to(hidden.dtype)
    return grad_hidden, _product(hidden.T, grad_y).sum(0) if need_weight else nothing


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Partial products `[S, m, n]` in float32 whose sum over S is `a @ b`."""
    (m, k), n = a.shape, b.shape[1]
    block_m = min(64, max(16, triton.next_power_of_2(m)))
    tiles = triton.cdiv(n, _BLOCK_N), triton.cdiv(m, block_m)
    wanted = triton.cdiv(2 * multiprocessors(a.device), max(tiles[0] * tiles[1], 1))
    k_part = max(triton.cdiv(triton.cdiv(k, wanted), _BLOCK_K), 1) * _BLOCK_K
    parts = triton.cdiv(k, k_part)
    out = a.new_empty(parts, m, n, dtype=accumulation_dtype(a.dtype))
    with launch_on(a):
        _partial_product[(*tiles, parts)](
            a, b, out, m, n, k, k_part, *a.stride(), *b.stride(),
            BLOCK_M=block_m, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, MIXED=a.dtype != b.dtype,
            num_warps=4, num_stages=3, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out
