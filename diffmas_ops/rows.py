"""Which tokens, columns and deferred rows an operator works on, each as one argument."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RowRanges(NamedTuple):
    """Row b's packed tokens are `q_begin[b] … q_end[b] - 1`, and `q_begin[b] + i` stands in column `starts[b] + i`.

    A token's column is its position. `q_begin, q_end, starts` are int32 `[batch]`. On the host: at most `max_seqlen_q`
    tokens are a row's, and no column they see is `max_seqlen_k` or above.
    """

    q_begin: Tensor
    q_end: Tensor
    starts: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def packed(cls, cu_seqlens_q: Tensor, starts: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> RowRanges:
        """Rows one after the other, row b's tokens from `cu_seqlens_q[b]` on; int32 `[batch + 1]`."""
        return cls(cu_seqlens_q[:-1], cu_seqlens_q[1:], starts, max_seqlen_q, max_seqlen_k)


class ColumnRanges(NamedTuple):
    """Columns `begin[b] … end[b] - 1` of every row b; int32 `[batch]`."""

    begin: Tensor
    end: Tensor


class Pending(NamedTuple):
    """Single-token queries whose gradients older columns still wait for: slot p of row b stands at `starts[b] + p`.

    `q, grad [batch, slots, heads, head_dim]` and `lse, delta [batch, slots, heads]`; `starts` int32 `[batch]`. A slot
    that was never written has `lse` = inf and zeros, and so contributes exactly 0.
    """

    q: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor
    starts: Tensor
