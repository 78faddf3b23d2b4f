"""How scores are made, and which of them count, for the Triton kernels; as scores.py.

`LOCAL`: whether there is a window or a chunk; the one that is absent is `WHOLE`. `CAPPED`: whether there is a soft
cap. Their sizes are ordinary arguments: a window that changes from call to call compiles nothing anew.
"""

import triton
import triton.language as tl

from diffmas_ops.scores import Scores

#: More columns than a trace has; sums of two are still integers of 32 bits.
WHOLE = 2**30
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


def arguments(scores: Scores) -> tuple[int, int, float]:
    """`window, chunk, softcap` of a kernel."""
    return min(scores.window or WHOLE, WHOLE), min(scores.chunk or WHOLE, WHOLE), scores.softcap or 1.0


def options(scores: Scores) -> dict[str, bool]:
    """What a kernel is compiled for."""
    return dict(LOCAL=scores.local, CAPPED=scores.softcap is not None)


@triton.jit
def first_seen(position, window, chunk, LOCAL: tl.constexpr):
    """The first column that a query at `position` sees."""
    first = position * 0
    if LOCAL:
        first = tl.maximum(tl.maximum(position - (window - 1), 0), position // chunk * chunk)
    return first


@triton.jit
def sees(position, column, window, chunk, LOCAL: tl.constexpr):
    seen = column <= position
    if LOCAL:
        seen = seen & (column >= first_seen(position, window, chunk, LOCAL))
    return seen


@triton.jit
def queries_seeing(column, start, count, window, chunk, LOCAL: tl.constexpr):
    """How many of `count` queries from position `start` on stand before `column` is out of their sight."""
    seeing = count
    if LOCAL:
        ahead = tl.minimum(window, chunk - column % chunk)
        seeing = tl.minimum(count, tl.maximum(column - start + ahead, 0))
    return seeing


@triton.jit
def _tanh(x):
    """Accurate everywhere (Cephes): a polynomial near zero, where 1 would swallow it, the exponential beyond."""
    square = x * x
    p = square * -5.70498872745e-3 + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, p * square * x + x, tl.where(x < 0, -far, far))


@triton.jit
def cap(scaled, softcap, CAPPED: tl.constexpr):
    """Scores of scaled products."""
    scores = scaled
    if CAPPED:
        scores = _tanh(scaled / softcap) * softcap
    return scores


@triton.jit
def through_cap(grad, scores, softcap, CAPPED: tl.constexpr):
    """Gradient of scaled products, given that of their scores."""
    through = grad
    if CAPPED:
        t = scores / softcap
        through = grad * (1.0 - t * t)
    return through
