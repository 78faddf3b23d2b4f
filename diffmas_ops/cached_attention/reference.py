"""`cached_attention` and its backward operators in plain PyTorch: the specification, any dtype, any device.

The backward formulas are those of FlashAttention-2 (arXiv 2307.08691, section 2.3); the log-sum-exp is natural.
"""

import torch
from torch import Tensor

from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.kv_append.reference import kv_append, row_ranges


def cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor,
    values: Tensor,
    q_begin: Tensor,
    q_end: Tensor,
    starts: Tensor,
    max_new: int,
    max_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Append `k, v` where given, then attend: `out [T, Hq, D]` and `lse [T, Hq]`."""
    if k is not None:
        kv_append(k, v, keys, values, q_begin, q_end, starts, max_new)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[:2], dtype=accumulation_dtype(q.dtype), device=q.device)
    for row, (begin, end, start) in enumerate(row_ranges(q_begin, q_end, starts)):
        if begin == end:
            continue
        columns = slice(0, start + end - begin)
        scores = _scores(q[begin:end], keys[row, :, columns], start, 0, scale)
        row_lse = torch.logsumexp(scores, dim=-1)
        probabilities = torch.exp(scores - row_lse.unsqueeze(-1))
        out[begin:end] = _ungroup(probabilities @ values[row, :, None, columns].to(scores.dtype)).to(q.dtype)
        lse[begin:end] = row_lse.flatten(0, 1).T
    return out, lse


def cached_attention_backward_queries(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    q_begin: Tensor,
    q_end: Tensor,
    starts: Tensor,
    max_new: int,
    max_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`grad_q [T, Hq, D]` and `delta [T, Hq] = Σ_d out · grad_out`."""
    acc = accumulation_dtype(q.dtype)
    grad_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    delta = (out.to(acc) * grad_out.to(acc)).sum(-1)
    for row, (begin, end, start) in enumerate(row_ranges(q_begin, q_end, starts)):
        if begin == end:
            continue
        tokens, columns = slice(begin, end), slice(0, start + end - begin)
        _, grad_scores = _score_gradient(
            grad_out[tokens], q[tokens], lse[tokens], delta[tokens],
            keys[row, :, columns], values[row, :, columns], start, 0, scale,
        )  # fmt: skip
        grad_q[tokens] = _ungroup(grad_scores @ keys[row, :, None, columns].to(acc) * scale).to(q.dtype)
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
    q_begin: Tensor,
    q_end: Tensor,
    starts: Tensor,
    column_begin: Tensor,
    column_end: Tensor,
    max_new: int,
    max_kv: int,
    scale: float,
) -> None:
    """Add what the rows' queries owe to columns `column_begin[b] … column_end[b] - 1`, in place."""
    ranges = row_ranges(q_begin, q_end, starts, column_begin, column_end)
    for row, (begin, end, start, first, last) in enumerate(ranges):
        if begin == end or first >= last:
            continue
        tokens, columns = slice(begin, end), slice(first, last)
        probabilities, grad_scores = _score_gradient(
            grad_out[tokens], q[tokens], lse[tokens], delta[tokens],
            keys[row, :, columns], values[row, :, columns], start, first, scale,
        )  # fmt: skip
        groups = keys.shape[1]
        grad_keys[row, :, columns] += (grad_scores.mT @ _group(q[tokens], groups)).sum(1) * scale
        grad_values[row, :, columns] += (probabilities.mT @ _group(grad_out[tokens], groups)).sum(1)


def cached_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
    q_begin: Tensor,
    q_end: Tensor,
    starts: Tensor,
    column_begin: Tensor,
    column_end: Tensor,
    max_new: int,
    max_kv: int,
    scale: float,
) -> Tensor:
    """The queries' gradient, and what `cached_attention_backward_columns` adds."""
    rows, sizes = (q_begin, q_end, starts), (max_new, max_kv, scale)
    grad_q, delta = cached_attention_backward_queries(grad_out, q, out, lse, keys, values, *rows, *sizes)
    cached_attention_backward_columns(
        grad_out, q, lse, delta, keys, values, grad_keys, grad_values, *rows, column_begin, column_end, *sizes
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
    pending_q: Tensor,
    pending_grad: Tensor,
    pending_lse: Tensor,
    pending_delta: Tensor,
    slot: int,
    q_begin: Tensor,
    q_end: Tensor,
    starts: Tensor,
    max_kv: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of a call of at most one token a row; defers what its queries owe to older columns.

    `pending_* [B, P, Hq(, D)]`: slot `slot` is written, slots after it hold the later single-token calls.
    """
    grad_q, delta = cached_attention_backward_queries(
        grad_out, q, out, lse, keys, values, q_begin, q_end, starts, 1, max_kv, scale
    )
    grad_k = torch.zeros(q.shape[0], *keys.shape[1::2], dtype=q.dtype, device=q.device)
    grad_v = torch.zeros_like(grad_k)
    groups = keys.shape[1]
    for row, (begin, end, column) in enumerate(row_ranges(q_begin, q_end, starts)):
        present = slice(begin, end)
        pending_q[row, slot] = q[present].sum(0)
        pending_grad[row, slot] = grad_out[present].sum(0)
        pending_lse[row, slot] = lse[begin] if end > begin else torch.inf
        pending_delta[row, slot] = delta[present].sum(0)
        if begin == end:
            continue
        own = slice(column, column + 1)
        probabilities, grad_scores = _score_gradient(
            pending_grad[row, slot:], pending_q[row, slot:], pending_lse[row, slot:], pending_delta[row, slot:],
            keys[row, :, own], values[row, :, own], column, column, scale,
        )  # fmt: skip
        own_k = (grad_scores.mT @ _group(pending_q[row, slot:], groups)).sum(1) * scale
        own_v = (probabilities.mT @ _group(pending_grad[row, slot:], groups)).sum(1)
        grad_k[begin] = (grad_keys[row, :, own] + own_k).squeeze(1)
        grad_v[begin] = (grad_values[row, :, own] + own_v).squeeze(1)
    return grad_q, grad_k, grad_v


def _group(x: Tensor, groups: int) -> Tensor:
    """`[n, Hq, D] -> [Hkv, Hq / Hkv, n, D]` in the accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _ungroup(x: Tensor) -> Tensor:
    """`[Hkv, Hq / Hkv, n, D] -> [n, Hq, D]`."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _scores(q: Tensor, keys: Tensor, start: int, first: int, scale: float) -> Tensor:
    """Masked `scale · q kᵀ [Hkv, Hq / Hkv, n, columns]` of queries at `start…` against columns `first…`."""
    queries = _group(q, keys.shape[0])
    scores = queries @ keys.unsqueeze(1).mT.to(queries.dtype) * scale
    positions = torch.arange(start, start + q.shape[0], device=q.device)
    columns = torch.arange(first, first + keys.shape[1], device=q.device)
    return scores.masked_fill(columns > positions.unsqueeze(1), -torch.inf)


def _score_gradient(
    grad_out: Tensor,
    q: Tensor,
    lse: Tensor,
    delta: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    first: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Probabilities `P` and score gradients `P ∘ (dO vᵀ - delta)`, both `[Hkv, Hq / Hkv, n, columns]`."""
    groups = keys.shape[0]
    row_lse = lse.unflatten(1, (groups, -1)).permute(1, 2, 0).unsqueeze(-1)
    row_delta = delta.unflatten(1, (groups, -1)).permute(1, 2, 0).unsqueeze(-1)
    probabilities = torch.exp(_scores(q, keys, start, first, scale) - row_lse)
    grad = _group(grad_out, groups)
    return probabilities, probabilities * (grad @ values.unsqueeze(1).mT.to(grad.dtype) - row_delta)
