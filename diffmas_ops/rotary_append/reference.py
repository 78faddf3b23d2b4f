"""`rotary_append` and its backward in plain PyTorch: the specification, any dtype, any device."""

from torch import Tensor

from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.kv_append.reference import kv_append
from diffmas_ops.kv_concat.reference import rotate


def rotary_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    keys: Tensor,
    values: Tensor,
    q_begin: Tensor,
    q_end: Tensor,
    starts: Tensor,
    max_new: int,
) -> Tensor:
    """`kv_append` of `k [T, Hkv, D]`, turned by its tokens' angles, and of `v`; returns `q [T, Hq, D]`, turned.

    `cos, sin [T, R/2]`, in the dtype of `q` or its accumulation dtype, are the angles of all heads of a token and may
    be scaled; how dims pair up: see `kv_concat.reference.rotate`.
    """
    kv_append(_turn(k, cos, sin, interleaved), v, keys, values, q_begin, q_end, starts, max_new)
    return _turn(q, cos, sin, interleaved)


def rotary_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the `q` and `k` that `rotary_append` turned, given those of what came out: turned back."""
    return _turn(grad_q, cos, -sin, interleaved), _turn(grad_k, cos, -sin, interleaved)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    acc = accumulation_dtype(x.dtype)
    return rotate(x.to(acc), cos.to(acc).unsqueeze(1), sin.to(acc).unsqueeze(1), interleaved).to(x.dtype)
