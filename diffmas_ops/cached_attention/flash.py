"""`cached_attention` of multi-token calls through the flash-attention engines of other libraries.

Rows that follow each other with the same number of new tokens and the same prefix are one batch, attended over a
zero-copy view of the trace; a ragged call is a few such batches. Finding them reads the row ranges on the host, once
a call (not once a layer): of all backends this one alone synchronises.

An engine returns the log-sum-exp and takes it back, together with the output, in its backward. That makes attention
over two sets of columns exact: where an engine's causal mask is not aligned to the last column, the prefix (no mask)
and the new columns (square mask) are attended one after the other, the results are merged, and both backward passes
get the merged output and log-sum-exp. Gradients of keys and values come in the trace's dtype and are added to the
accumulators. Single-token calls are not served: they are bound by memory, not by matmul.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from diffmas_ops import backends
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.flash_engines import Engine, How, choose
from diffmas_ops.rows import ColumnRanges, RowRanges
from diffmas_ops.scores import Scores


class _Batch(NamedTuple):
    """Rows `first … last - 1`: tokens from `begin` on, `each` of a row, at positions from `start` on.

    The first `count` of them see columns before `end`; those from `low` on take gradients.
    """

    first: int
    last: int
    begin: int
    count: int
    start: int
    low: int
    end: int
    each: int

    def tokens(self, packed: Tensor) -> Tensor:
        """`[tokens, heads, ...]` as `[rows, heads, count, ...]`, without a copy."""
        rows = self.last - self.first
        together = packed[self.begin : self.begin + rows * self.each].unflatten(0, (rows, self.each))
        return together[:, : self.count].transpose(1, 2)

    def columns(self, trace: Tensor, span: slice) -> Tensor:
        return trace[self.first : self.last, :, span]

    def seeing(self, scores: Scores) -> _Batch:
        """Without the tokens that stand so far behind the columns that a window hides them all."""
        if scores.window is None:
            return self
        return self._replace(count=max(0, min(self.count, self.end - 1 + scores.window - self.start)))

    def parts(self, engine: Engine, scores: Scores) -> list[tuple[slice, How]]:
        """Columns the queries see, and how; the last of them are the queries' own where causal."""
        how = How(scores.softmax_scale, False, softcap=scores.softcap or 0.0)
        first, new = scores.first_seen(self.start), slice(self.start, self.start + self.count)
        if self.count == 0:
            return []
        if self.end <= self.start:
            # An engine takes the last query to stand at the last column, which it may be far behind.
            left = -1 if scores.window is None else scores.window - 1 - (new.stop - self.end)
            return [(slice(first, self.end), how._replace(left=left))]
        if engine.aligned_to_end or self.start == 0:
            left = -1 if scores.window is None else scores.window - 1
            return [(slice(first, new.stop), how._replace(causal=True, left=left))]
        return [(slice(0, self.start), how), (new, how._replace(causal=True))]


def cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor,
    values: Tensor,
    rows: RowRanges,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """See `reference.cached_attention`; what an engine lacks of the scores is refused by its name."""
    engine = choose(q, scores.check().asked)
    if k is not None:
        append = backends.functions("kv_append", keys).kv_append
        append(k, v, keys, values, rows)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
    for batch in _batches(*rows[:3]):
        states = [
            engine.forward(batch.tokens(q), *(batch.columns(x, span) for x in (keys, values)), how)
            for span, how in batch.parts(engine, scores)
        ]
        batch_out, batch_lse = states[0] if len(states) == 1 else _merge(*states)
        batch.tokens(out).copy_(batch_out)
        batch.tokens(lse).copy_(batch_lse)
    return out, lse


def cached_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
    rows: RowRanges,
    columns: ColumnRanges,
    scores: Scores,
) -> Tensor:
    """`cached_attention_backward_queries` and `…_columns` in one: engines compute all gradients together."""
    batches = _batches(*rows[:3], *columns)
    return _backward(grad_out, q, out, lse, keys, values, (grad_keys, grad_values), batches, scores)


def cached_attention_backward_queries(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: RowRanges,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """See `reference.cached_attention_backward_queries`; `cached_attention_backward` saves half of the work."""
    delta = (out.to(lse.dtype) * grad_out.to(lse.dtype)).sum(-1)
    batches = _batches(*rows[:3])
    return _backward(grad_out, q, out, lse, keys, values, None, batches, scores), delta


def cached_attention_backward_columns(
    grad_out: Tensor,
    q: Tensor,
    lse: Tensor,
    delta: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
    rows: RowRanges,
    columns: ColumnRanges,
    scores: Scores,
) -> None:
    """See `reference.cached_attention_backward_columns`."""
    # An engine wants the output only to form delta = out · grad_out: the part of it along grad_out does.
    grad = grad_out.to(delta.dtype)
    square = (grad * grad).sum(-1)
    along = grad * torch.where(square > 0, delta / square, 0.0).unsqueeze(-1)
    batches = _batches(*rows[:3], *columns)
    _backward(grad_out, q, along.to(q.dtype), lse, keys, values, (grad_keys, grad_values), batches, scores)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    accumulators: tuple[Tensor, Tensor] | None,
    batches: list[_Batch],
    scores: Scores,
) -> Tensor:
    """Gradient of q; those of keys and values are added to the accumulators, where given."""
    engine = choose(q, scores.asked)
    grad_q = q.new_empty(q.shape)
    for batch in (b.seeing(scores) for b in batches):
        grad, queries, output = (batch.tokens(x) for x in (grad_out, q, out))
        batch_lse = batch.tokens(lse).contiguous()
        parts = []
        for span, how in batch.parts(engine, scores):
            views = [batch.columns(x, span) for x in (keys, values)]
            part, *grads = engine.backward(grad, queries, *views, output, batch_lse, how)
            parts.append(part)
            low, high = max(batch.low, span.start), min(batch.end, span.stop)
            if accumulators is not None and low < high:
                for accumulator, new in zip(accumulators, grads, strict=True):
                    new = new[:, :, low - span.start : high - span.start]
                    batch.columns(accumulator, slice(low, high)).add_(new)
        if parts:
            batch.tokens(grad_q).copy_(parts[0] if len(parts) == 1 else parts[0].to(lse.dtype) + parts[1])
    return grad_q


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(first[1], second[1])
    return sum(out * torch.exp(part - lse).unsqueeze(-1) for out, part in (first, second)), lse


_remembered: dict[int, tuple[list[weakref.ref], list[int], list[_Batch]]] = {}


def _batches(*ranges: Tensor) -> list[_Batch]:
    """Runs of alike rows of `q_begin, q_end, starts` and, for gradients of columns, their begin and end.

    The last answer is kept: every layer of a call asks the same.
    """
    if (last := _remembered.get(len(ranges))) is not None:
        references, versions, batches = last
        if all(r() is x and n == x._version for r, n, x in zip(references, versions, ranges, strict=True)):
            return batches
    batches: list[_Batch] = []
    for row, (begin, end, start, *columns) in enumerate(zip(*torch.stack(ranges).tolist(), strict=True)):
        count = end - begin
        low, last_column = columns or (0, start + count)
        if count == 0 or low >= last_column:
            continue
        new = _Batch(row, row + 1, begin, count, start, low, last_column, count)
        before = batches[-1] if batches else None
        if (
            before
            and before.last == row
            and before[3:] == new[3:]
            and (before.begin + (row - before.first) * count == begin)
        ):
            batches[-1] = before._replace(last=row + 1)
        else:
            batches.append(new)
    _remembered[len(ranges)] = [weakref.ref(x) for x in ranges], [x._version for x in ranges], batches
    return batches
