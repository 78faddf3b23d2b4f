"""`cached_attention` and its backward operators in plain PyTorch: the specification, any dtype, any device.

The backward formulas are those of FlashAttention-2 (arXiv 2307.08691, section 2.3); the log-sum-exp is natural.
"""

import torch
from torch import Tensor

from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.kv_append.reference import kv_append, on_host
from diffmas_ops.rows import ColumnRanges, Pending, RowRanges
from diffmas_ops.scores import Scores


def cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor,
    values: Tensor,
    rows: RowRanges,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """Append `k, v` where given, then attend to what `scores` lets see: `out [T, Hq, D]` and `lse [T, Hq]`."""
    scores.check()
    if k is not None:
        kv_append(k, v, keys, values, rows)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[:2], dtype=accumulation_dtype(q.dtype), device=q.device)
    for row, (begin, end, start) in enumerate(on_host(*rows[:3])):
        if begin == end:
            continue
        columns = slice(0, start + end - begin)
        found, seen = _scores(q[begin:end], keys[row, :, columns], start, 0, scores)
        found = found.masked_fill(~seen, -torch.inf)
        row_lse = torch.logsumexp(found, dim=-1)
        probabilities = torch.exp(found - row_lse.unsqueeze(-1))
        out[begin:end] = _ungroup(probabilities @ values[row, :, None, columns].to(found.dtype)).to(q.dtype)
        lse[begin:end] = row_lse.flatten(0, 1).T
    return out, lse


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
    """`grad_q [T, Hq, D]` and `delta [T, Hq] = Σ_d out · grad_out`."""
    acc = accumulation_dtype(q.dtype)
    grad_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    delta = (out.to(acc) * grad_out.to(acc)).sum(-1)
    for row, (begin, end, start) in enumerate(on_host(*rows[:3])):
        if begin == end:
            continue
        tokens, columns = slice(begin, end), slice(0, start + end - begin)
        _, grad_scores = _score_gradient(
            grad_out[tokens], q[tokens], lse[tokens], delta[tokens],
            keys[row, :, columns], values[row, :, columns], start, 0, scores,
        )  # fmt: skip
        grad_q[tokens] = _ungroup(grad_scores @ keys[row, :, None, columns].to(acc) * scores.softmax_scale).to(q.dtype)
    return grad_q, delta


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
    """Add what the rows' queries owe to `columns`, in place."""
    for row, (begin, end, start, first, last) in enumerate(on_host(*rows[:3], *columns)):
        if begin == end or first >= last:
            continue
        tokens, owed = slice(begin, end), slice(first, last)
        probabilities, grad_scores = _score_gradient(
            grad_out[tokens], q[tokens], lse[tokens], delta[tokens],
            keys[row, :, owed], values[row, :, owed], start, first, scores,
        )  # fmt: skip
        groups = keys.shape[1]
        grad_keys[row, :, owed] += (grad_scores.mT @ _group(q[tokens], groups)).sum(1) * scores.softmax_scale
        grad_values[row, :, owed] += (probabilities.mT @ _group(grad_out[tokens], groups)).sum(1)


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
    """The queries' gradient, and what `cached_attention_backward_columns` adds."""
    grad_q, delta = cached_attention_backward_queries(grad_out, q, out, lse, keys, values, rows, scores)
    cached_attention_backward_columns(
        grad_out, q, lse, delta, keys, values, grad_keys, grad_values, rows, columns, scores
    )
    return grad_q


def cached_attention_backward_token(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
    pending: Pending,
    rows: RowRanges,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of a call of at most one token a row; defers what its queries owe to older columns.

    A row's token is written into its slot of `pending`; the slots after it hold the later single-token calls.
    """
    grad_q, delta = cached_attention_backward_queries(grad_out, q, out, lse, keys, values, rows, scores)
    grad_k = torch.zeros(q.shape[0], *keys.shape[1::2], dtype=q.dtype, device=q.device)
    grad_v = torch.zeros_like(grad_k)
    groups = keys.shape[1]
    for row, (begin, end, column, first) in enumerate(on_host(*rows[:3], pending.starts)):
        if begin == end:
            continue
        slot = column - first
        for to, source in zip(pending[:4], (q, grad_out, lse, delta), strict=True):
            to[row, slot] = source[begin]
        own = slice(column, column + 1)
        later_q, later_grad, later_lse, later_delta = (x[row, slot:] for x in pending[:4])
        probabilities, grad_scores = _score_gradient(
            later_grad, later_q, later_lse, later_delta, keys[row, :, own], values[row, :, own], column, column, scores,
        )  # fmt: skip
        own_k = (grad_scores.mT @ _group(later_q, groups)).sum(1) * scores.softmax_scale
        own_v = (probabilities.mT @ _group(later_grad, groups)).sum(1)
        grad_k[begin] = (grad_keys[row, :, own] + own_k).squeeze(1)
        grad_v[begin] = (grad_values[row, :, own] + own_v).squeeze(1)
    return grad_q, grad_k, grad_v


def _group(x: Tensor, groups: int) -> Tensor:
    """`[n, Hq, D] -> [Hkv, Hq / Hkv, n, D]` in the accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _ungroup(x: Tensor) -> Tensor:
    """`[Hkv, Hq / Hkv, n, D] -> [n, Hq, D]`."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, keys: Tensor, start: int, first: int, scores: Scores) -> tuple[Tensor, Tensor]:
    """Scores `[Hkv, Hq / Hkv, n, columns]` of queries at `start…` against columns `first…`, and which are seen."""
    queries = _group(q, keys.shape[0])
    scaled = queries @ keys.unsqueeze(1).mT.to(queries.dtype) * scores.softmax_scale
    positions = torch.arange(start, start + q.shape[0], device=q.device)
    columns = torch.arange(first, first + keys.shape[1], device=q.device)
    return scores.cap(scaled), scores.sees(positions.unsqueeze(1), columns)


def _score_gradient(
    grad_out: Tensor,
    q: Tensor,
    lse: Tensor,
    delta: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    first: int,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """Probabilities `P` and gradients `P ∘ (dO vᵀ - delta)` through the cap, both `[Hkv, Hq / Hkv, n, columns]`."""
    groups = keys.shape[0]
    row_lse = lse.unflatten(1, (groups, -1)).permute(1, 2, 0).unsqueeze(-1)
    row_delta = delta.unflatten(1, (groups, -1)).permute(1, 2, 0).unsqueeze(-1)
    found, seen = _scores(q, keys, start, first, scores)
    probabilities = torch.exp(found - row_lse).masked_fill(~seen, 0.0)
    grad = _group(grad_out, groups)
    grad_scores = probabilities * (grad @ values.unsqueeze(1).mT.to(grad.dtype) - row_delta)
    return probabilities, grad_scores * scores.slope(found)
