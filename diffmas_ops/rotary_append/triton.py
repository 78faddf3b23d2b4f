"""`rotary_append` and its backward in Triton: one kernel that moves heads and turns them on the way."""

import triton
import triton.language as tl
from torch import Tensor

from diffmas_ops.triton_device import LAUNCH_OPTIONS, launch_on

_TILE = 4096  # elements of one head that a program moves


@triton.jit
def _turned(
    source, target, cos, sin, token, inside, TURNS: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr,
    BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """Heads at `source` and `target [tokens, 1]`, turned where TURNS. Pairs beyond the rotated dims do not turn."""
    p = tl.arange(0, BLOCK_P)[None, :]
    split = (p < HALF) & (not INTERLEAVED)
    low = tl.where(split, p, 2 * p)
    high = tl.where(split, HALF + p, 2 * p + 1)
    rotated = (p < HALF) & TURNS & inside
    a = tl.load(source + low, mask=inside & (low < D), other=0.0)
    b = tl.load(source + high, mask=inside & (high < D), other=0.0)
    c = tl.load(cos + token * HALF + p, mask=rotated, other=1.0).to(tl.float32)
    s = tl.load(sin + token * HALF + p, mask=rotated, other=0.0).to(tl.float32) * SIGN
    first, second = a.to(tl.float32), b.to(tl.float32)
    a = tl.where(rotated, first * c - second * s, first)
    b = tl.where(rotated, second * c + first * s, second)
    tl.store(target + low, a.to(target.dtype.element_ty), mask=inside & (low < D))
    tl.store(target + high, b.to(target.dtype.element_ty), mask=inside & (high < D))


@triton.jit(do_not_specialize=["tokens"])
def _rotary_append(
    q, k, v, out, keys, values, cos, sin, q_begin, q_end, starts, tokens, batch,
    q_t, q_h, k_t, k_h, v_t, v_h, out_t, out_h, keys_b, keys_h, keys_c, values_b, values_h, values_c,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Programs of a block of tokens: one for each head of q, then of k, then of v."""
    head = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = t.to(tl.int64)[:, None]
    if head < HEADS:
        inside = (t < tokens)[:, None]
        source, target = q + token * q_t + head * q_h, out + token * out_t + head * out_h
        _turned(source, target, cos, sin, token, inside, True, HALF, D, BLOCK_P, INTERLEAVED, 1.0)
    else:
        # A token belongs to one row at most.
        b = tl.arange(0, BLOCK_B)[None, :]
        begin = tl.load(q_begin + b, mask=b < batch, other=0)
        claims = (begin <= t[:, None]) & (t[:, None] < tl.load(q_end + b, mask=b < batch, other=0))
        inside = tl.sum(claims.to(tl.int32), 1)[:, None] > 0
        row = tl.sum(tl.where(claims, b, 0), 1).to(tl.int64)[:, None]
        first = tl.load(starts + b, mask=b < batch, other=0) - begin
        column = tl.sum(tl.where(claims, first, 0), 1)[:, None] + token
        if head < HEADS + KV_HEADS:
            h = (head - HEADS).to(tl.int64)
            source, target = k + token * k_t + h * k_h, keys + row * keys_b + h * keys_h + column * keys_c
            _turned(source, target, cos, sin, token, inside, True, HALF, D, BLOCK_P, INTERLEAVED, 1.0)
        else:
            h = (head - HEADS - KV_HEADS).to(tl.int64)
            source, target = v + token * v_t + h * v_h, values + row * values_b + h * values_h + column * values_c
            _turned(source, target, cos, sin, token, inside, False, HALF, D, BLOCK_P, INTERLEAVED, 1.0)


@triton.jit(do_not_specialize=["tokens"])
def _rotary_backward(
    grad_q, grad_k, to_q, to_k, cos, sin, tokens, q_t, q_h, k_t, k_h, to_q_t, to_q_h, to_k_t, to_k_h,
    HEADS: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token, inside = t.to(tl.int64)[:, None], (t < tokens)[:, None]
    if head < HEADS:
        source, target = grad_q + token * q_t + head * q_h, to_q + token * to_q_t + head * to_q_h
    else:
        h = head - HEADS
        source, target = grad_k + token * k_t + h * k_h, to_k + token * to_k_t + h * to_k_h
    _turned(source, target, cos, sin, token, inside, True, HALF, D, BLOCK_P, INTERLEAVED, -1.0)


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
    """See `reference.rotary_append`."""
    out, cos, sin = q.new_empty(q.shape), cos.contiguous(), sin.contiguous()
    (tokens, heads, _), (batch, kv_heads) = q.shape, keys.shape[:2]
    shape, blocks = _shape(q, cos, interleaved)
    with launch_on(q):
        _rotary_append[blocks, heads + 2 * kv_heads](
            q, k, v, out, keys, values, cos, sin, q_begin, q_end, starts, tokens, batch,
            *(n for x in (q, k, v, out) for n in x.stride()[:2]), *keys.stride()[:3], *values.stride()[:3],
            HEADS=heads, KV_HEADS=kv_heads, BLOCK_B=triton.next_power_of_2(batch), **shape, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return out


def rotary_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `reference.rotary_backward`."""
    to_q, to_k = grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    shape, blocks = _shape(grad_q, cos, interleaved)
    with launch_on(grad_q):
        _rotary_backward[blocks, grad_q.shape[1] + grad_k.shape[1]](
            grad_q, grad_k, to_q, to_k, cos, sin, len(grad_q),
            *(n for x in (grad_q, grad_k, to_q, to_k) for n in x.stride()[:2]),
            HEADS=grad_q.shape[1], **shape, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return to_q, to_k


def _shape(x: Tensor, cos: Tensor, interleaved: bool) -> tuple[dict, int]:
    """Compile-time shape, and blocks of tokens."""
    block_p = triton.next_power_of_2(triton.cdiv(x.shape[2], 2))
    # Two tile heights, not one per length: a new one is a compilation in the middle of somebody's training.
    block_t = 16 if len(x) <= 16 else max(_TILE // (2 * block_p), 16)
    shape = dict(HALF=cos.shape[1], D=x.shape[2], BLOCK_T=block_t, BLOCK_P=block_p, INTERLEAVED=interleaved)
    return shape, triton.cdiv(len(x), block_t)
