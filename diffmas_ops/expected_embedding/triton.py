"""`expected_embedding` and its backward in Triton: attention of a few query rows over the whole vocabulary.

Programs share out the vocabulary, and each reads its tokens once for all of a block of rows. A program's sum over its
tokens is too wide for registers: it grows in memory, tile by tile, and stays in the L2 cache. The sums of all programs
are added in a fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from diffmas_ops.cached_attention.triton_scores import LOG2E, cap
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.triton_device import LAUNCH_OPTIONS, launch_on, multiprocessors

#: Rows, tokens of the vocabulary, and elements of a token's key or value that are looked at together.
_ROWS, _TOKENS, _DEPTH = 16, 128, 64
_WARPS = 8


@triton.jit
def _product(a, b, total, MIXED: tl.constexpr):
    """`total + a @ b`, `a` and `b` of one dtype; with `MIXED`, `a` in float32 and `b` in 16 bits."""
    if MIXED:
        # A 16-bit operand is exact in TensorFloat-32; three products carry the other to float32 accuracy.
        total = tl.dot(a, b.to(tl.float32), total, input_precision="tf32x3")
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _logits(
    left, matrix, bias, rows, tokens, row_mask, token_mask, size, stride, scale, softcap,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """`scale · (left[rows] @ matrix[tokens]ᵀ + bias[tokens])`, capped; `left` is contiguous."""
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for k0 in range(0, size, DEPTH):
        k = (k0 + tl.arange(0, DEPTH)).to(tl.int64)
        a = tl.load(left + rows * size + k[None, :], mask=row_mask & (k < size)[None, :], other=0.0)
        b = tl.load(matrix + tokens * stride + k[:, None], mask=token_mask & (k < size)[:, None], other=0.0)
        total = _product(a, b, total, False)
    if BIASED:
        total += tl.load(bias + tokens, mask=token_mask, other=0.0).to(tl.float32)
    return cap(total * scale, softcap, CAPPED)


@triton.jit
def _add_values(
    weights, kept, matrix, out, rows, tokens, row_mask, token_mask, size, stride, again,
    DEPTH: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """`out[rows] = kept · out[rows] + weights @ matrix[tokens]`; unless `again`, `out` holds nothing yet."""
    for e0 in range(0, size, DEPTH):
        e = (e0 + tl.arange(0, DEPTH)).to(tl.int64)[None, :]
        at, mask = out + rows * size + e, row_mask & (e < size)
        b = tl.load(matrix + tokens * stride + e, mask=token_mask & (e < size), other=0.0)
        before = tl.load(at, mask=mask & again, other=0.0)
        tl.store(at, _product(weights, b, before * kept, MIXED), mask=mask)
    # What a thread wrote here, another one may read for the next tokens.
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n", "vocab", "per_part"])
def _attend(
    hidden, keys, values, bias, temperature, out, highest, total, n, vocab, per_part, depth, width, keys_s, values_s,
    scale, softcap,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Of a part of the vocabulary: unnormalised sums `[parts, n, width]`, maxima and sums of weights `[parts, n]`."""
    part = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    down, row_mask = rows[:, None], (rows < n)[:, None]
    slope = LOG2E / tl.load(temperature)
    out += part * n * width
    above, summed = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    begin = part * per_part
    for t0 in range(begin, tl.minimum(begin + per_part, vocab), TOKENS):
        tokens = t0 + tl.arange(0, TOKENS).to(tl.int64)
        known = tokens < vocab
        logits = _logits(
            hidden, keys, bias, down, tokens[None, :], row_mask, known[None, :], depth, keys_s, scale, softcap,
            ROWS, TOKENS, DEPTH, BIASED, CAPPED,
        )  # fmt: skip
        scores = tl.where(known[None, :], logits * slope, float("-inf"))
        higher = tl.maximum(above, tl.max(scores, 1))
        # A block in which all scores are minus infinity weighs nothing.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept, weights = tl.exp2(above - base), tl.exp2(scores - base[:, None])
        summed = summed * kept + tl.sum(weights, 1)
        above = higher
        _add_values(
            weights, kept[:, None], values, out, down, tokens[:, None], row_mask, known[:, None], width, values_s,
            (t0 + tl.zeros([1, 1], tl.int64)) > begin, DEPTH, MIXED,
        )  # fmt: skip
    tl.store(highest + part * n + rows, above, mask=rows < n)
    tl.store(total + part * n + rows, summed, mask=rows < n)


@triton.jit(do_not_specialize=["parts", "n"])
def _combine(sums, highest, total, out, lse, parts, n, width, BLOCK: tl.constexpr):
    """A tile of a row a program: its parts put together."""
    row, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    above = tl.load(highest + row)
    for part in range(1, parts):
        above = tl.maximum(above, tl.load(highest + part * n + row))
    summed, result = 0.0, tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        at = tl.cast(part, tl.int64) * n + row
        weight = tl.exp2(tl.load(highest + at) - above)
        summed += weight * tl.load(total + at)
        result += weight * tl.load(sums + at * width + e, mask=e < width, other=0.0)
    tl.store(out + row * width + e, (result / summed).to(out.dtype.element_ty), mask=e < width)
    tl.store(lse + row, (above + tl.log2(summed)) / LOG2E)


@triton.jit(do_not_specialize=["n", "vocab", "per_part"])
def _attend_backward(
    grad, hidden, keys, values, bias, temperature, lse, delta, grad_hidden, grad_scores, n, vocab, per_part, depth,
    width, keys_s, values_s, scale, softcap,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """Of a part: gradients of hidden states `[parts, n, depth]`, and `Σ score · its gradient` `[parts, n]`."""
    part = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    down, row_mask = rows[:, None], (rows < n)[:, None]
    cold = 1.0 / tl.load(temperature)
    row_lse = tl.load(lse + rows, mask=rows < n, other=0.0)[:, None]
    row_delta = tl.load(delta + rows, mask=rows < n, other=0.0)[:, None]
    grad_hidden += part * n * depth
    summed = tl.zeros([ROWS], tl.float32)
    begin = part * per_part
    for t0 in range(begin, tl.minimum(begin + per_part, vocab), TOKENS):
        tokens = t0 + tl.arange(0, TOKENS).to(tl.int64)
        known = tokens < vocab
        logits = _logits(
            hidden, keys, bias, down, tokens[None, :], row_mask, known[None, :], depth, keys_s, scale, softcap,
            ROWS, TOKENS, DEPTH, BIASED, CAPPED,
        )  # fmt: skip
        towards = _logits(
            grad, values, bias, down, tokens[None, :], row_mask, known[None, :], width, values_s, 1.0, softcap,
            ROWS, TOKENS, DEPTH, False, False,
        )  # fmt: skip
        scores = logits * cold
        weights = tl.where(known[None, :], tl.exp2((scores - row_lse) * LOG2E), 0.0)
        slopes = weights * (towards - row_delta)
        # A token of score minus infinity has no weight; it would make 0 · ∞ of it.
        summed += tl.sum(slopes * tl.maximum(scores, -3.0e38), 1)
        slopes *= scale * cold
        if CAPPED:
            slopes *= 1.0 - (logits / softcap) * (logits / softcap)
        _add_values(
            slopes, 1.0, keys, grad_hidden, down, tokens[:, None], row_mask, known[:, None], depth, keys_s,
            (t0 + tl.zeros([1, 1], tl.int64)) > begin, DEPTH, MIXED,
        )  # fmt: skip
    tl.store(grad_scores + part * n + rows, summed, mask=rows < n)


def expected_embedding(
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `reference.expected_embedding`."""
    hidden, acc = hidden.contiguous(), accumulation_dtype(hidden.dtype)
    (n, width), (vocab, per_part, parts) = (len(hidden), values.shape[1]), _shares(hidden, keys)
    sums = hidden.new_empty(parts, n, width, dtype=acc)
    highest, total = (hidden.new_empty(parts, n, dtype=acc) for _ in range(2))
    out, lse = hidden.new_empty(n, width), hidden.new_empty(n, dtype=acc)
    if n == 0:
        return out, lse
    with launch_on(hidden):
        _attend[(triton.cdiv(n, _ROWS), parts)](
            hidden, keys, values, keys if bias is None else bias, temperature, sums, highest, total, n, vocab, per_part,
            hidden.shape[1], width, keys.stride(0), values.stride(0), scale, 1.0 if softcap is None else softcap,
            **_options(hidden, bias, softcap),
        )  # fmt: skip
        _combine[(n, triton.cdiv(width, 512))](
            sums, highest, total, out, lse, parts, n, width, BLOCK=512, num_warps=4, **LAUNCH_OPTIONS
        )
    return out, lse


def expected_embedding_backward(
    grad_out: Tensor,
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """See `reference.expected_embedding_backward`."""
    hidden, grad_out, acc = hidden.contiguous(), grad_out.contiguous(), accumulation_dtype(hidden.dtype)
    (n, depth), (vocab, per_part, parts) = hidden.shape, _shares(hidden, keys)
    grad_hidden = hidden.new_empty(parts, n, depth, dtype=acc)
    grad_scores = hidden.new_empty(parts, n, dtype=acc)
    delta = (grad_out.to(acc) * out.to(acc)).sum(-1)
    if n > 0:
        with launch_on(hidden):
            _attend_backward[(triton.cdiv(n, _ROWS), parts)](
                grad_out, hidden, keys, values, keys if bias is None else bias, temperature, lse, delta, grad_hidden,
                grad_scores, n, vocab, per_part, depth, values.shape[1], keys.stride(0), values.stride(0), scale,
                1.0 if softcap is None else softcap, **_options(hidden, bias, softcap),
            )  # fmt: skip
    return grad_hidden.sum(0).to(hidden.dtype), -grad_scores.sum().reshape(1) / temperature


def _shares(hidden: Tensor, keys: Tensor) -> tuple[int, int, int]:
    """The vocabulary, how much of it a program takes, and how many programs a block of rows has."""
    vocab, blocks = len(keys), max(triton.cdiv(len(hidden), _ROWS), 1)
    wanted = min(triton.cdiv(vocab, _TOKENS), triton.cdiv(2 * multiprocessors(hidden.device), blocks))
    per_part = triton.cdiv(triton.cdiv(vocab, wanted), _TOKENS) * _TOKENS
    return vocab, per_part, triton.cdiv(vocab, per_part)


def _options(hidden: Tensor, bias: Tensor | None, softcap: float | None) -> dict:
    return dict(
        ROWS=_ROWS, TOKENS=_TOKENS, DEPTH=_DEPTH, BIASED=bias is not None, CAPPED=softcap is not None,
        MIXED=hidden.dtype != accumulation_dtype(hidden.dtype), num_warps=_WARPS, num_stages=2, **LAUNCH_OPTIONS,
    )  # fmt: skip
