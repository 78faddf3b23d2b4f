"""What a query sees of its row, for the Triton kernels; as mask.py. `WINDOW` 0: no window."""

import triton
import triton.language as tl


@triton.jit
def sees(position, column, WINDOW: tl.constexpr):
    seen = column <= position
    if WINDOW > 0:
        seen = seen & (position - column < WINDOW)
    return seen


@triton.jit
def first_seen(position, WINDOW: tl.constexpr):
    """The first column that a query at `position` sees."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position + 1 - WINDOW, 0)
    return first


@triton.jit
def queries_seeing(column, start, count, WINDOW: tl.constexpr):
    """How many of `count` queries from position `start` on stand before `column` is out of their sight."""
    seeing = count
    if WINDOW > 0:
        seeing = tl.minimum(count, tl.maximum(column + WINDOW - start, 0))
    return seeing
