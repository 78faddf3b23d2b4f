"""`cached_attention` and its backward operators in Triton: planning and launches; the kernels are next door."""

import triton
from torch import Tensor

from diffmas_ops.cached_attention.tiles import split, tile
from diffmas_ops.cached_attention.triton_backward import columns_kernel, queries_kernel, token_kernel
from diffmas_ops.cached_attention.triton_forward import forward_kernel
from diffmas_ops.cached_attention.triton_scores import arguments, options
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.kv_append.triton import kv_append
from diffmas_ops.merge_states.triton import merge_into
from diffmas_ops.rows import ColumnRanges, Pending, RowRanges
from diffmas_ops.scores import Scores
from diffmas_ops.triton_device import LAUNCH_OPTIONS, launch_on

_BLOCK_PENDING = 32


def cached_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor,
    values: Tensor,
    rows: RowRanges,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """See `reference.cached_attention`."""
    scores.check()
    if k is not None:
        kv_append(k, v, keys, values, rows)
    scale = scores.softmax_scale
    if scale <= 0:
        q, scores = q * (-1.0 if scale < 0 else 0.0), scores._replace(softmax_scale=-scale or 1.0)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
    grid, splits, width, shape = _plan("forward", q, keys, rows, scores)
    outs, lses = out.unsqueeze(0), lse.unsqueeze(0)
    if splits > 1:
        outs, lses = lse.new_empty(splits, *q.shape), lse.new_empty(splits, *lse.shape)
    with launch_on(q):
        forward_kernel[grid](
            q, keys, values, outs, lses, *rows[:3], splits, width, scores.softmax_scale, *arguments(scores),
            *_strides(q, keys, values), *outs.stride()[:3], *lses.stride()[:2], **shape,
        )  # fmt: skip
    if splits > 1:
        merge_into(outs, lses, out, lse)
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
    """See `reference.cached_attention_backward_queries`."""
    parts, delta = _query_gradients(grad_out, q, out, lse, keys, values, rows, scores, q.dtype)
    return parts[0] if len(parts) == 1 else parts.sum(0).to(q.dtype), delta


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
    group = q.shape[1] // keys.shape[1]
    chosen = tile("columns", q, rows.max_seqlen_q * group)
    with launch_on(q):
        columns_kernel[triton.cdiv(rows.max_seqlen_k, chosen.block_n), keys.shape[1], keys.shape[0]](
            grad_out, q, lse, delta, keys, values, grad_keys, grad_values,
            *rows[:3], *columns, scores.softmax_scale, *arguments(scores),
            *_strides(grad_out, q), lse.stride(0), delta.stride(0), *_strides(keys, values, grad_keys, grad_values),
            **_shape(q, group, chosen, scores),
        )  # fmt: skip


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
    """See `reference.cached_attention_backward`."""
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
    """See `reference.cached_attention_backward_token`."""
    batch, kv_heads, _, head_dim = keys.shape
    group = q.shape[1] // kv_heads
    parts, delta = _query_gradients(grad_out, q, out, lse, keys, values, rows, scores, lse.dtype)
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (q.new_empty(q.shape[0], kv_heads, head_dim) for _ in range(2))
    with launch_on(q):
        token_kernel[kv_heads, batch](
            parts, grad_out, q, lse, delta, keys, values, grad_keys, grad_values, grad_q, grad_k, grad_v,
            *pending, *rows[:3], len(parts), pending.q.shape[1], scores.softmax_scale, *arguments(scores),
            *parts.stride()[:3], *_strides(grad_out, q), lse.stride(0), delta.stride(0),
            *_strides(keys, values, grad_keys, grad_values, pending.q, pending.grad),
            *pending.lse.stride()[:2], *pending.delta.stride()[:2],
            G=group, D=head_dim, BLOCK_G=triton.next_power_of_2(group), BLOCK_M=_BLOCK_PENDING,
            BLOCK_D=triton.next_power_of_2(head_dim), **options(scores), **LAUNCH_OPTIONS,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _query_gradients(grad_out, q, out, lse, keys, values, rows, scores, whole_dtype) -> tuple[Tensor, Tensor]:
    """`grad_q [S, T, Hq, D]`, what each part of the columns adds (in `whole_dtype` if S is 1), and `delta [T, Hq]`."""
    grid, splits, width, shape = _plan("queries", q, keys, rows, scores)
    parts = q.new_empty(splits, *q.shape, dtype=whole_dtype if splits == 1 else lse.dtype)
    delta = lse.new_empty(lse.shape)
    with launch_on(q):
        queries_kernel[grid](
            grad_out, q, out, lse, keys, values, parts, delta, *rows[:3], splits, width, scores.softmax_scale,
            *arguments(scores), *_strides(grad_out, q, out), lse.stride(0), *_strides(keys, values),
            *parts.stride()[:3], delta.stride(0), **shape,
        )  # fmt: skip
    return parts, delta


def _plan(kernel: str, q: Tensor, keys: Tensor, rows: RowRanges, scores: Scores) -> tuple[tuple, int, int, dict]:
    """Grid, parts of the columns, columns per part and compile-time shape of a kernel over blocks of queries."""
    batch, kv_heads = keys.shape[:2]
    group = q.shape[1] // kv_heads
    chosen = tile(kernel, q, rows.max_seqlen_q * group)
    blocks = triton.cdiv(rows.max_seqlen_q * group, chosen.block_m)
    # Of the columns a block sees, which begin at a multiple of block_n.
    together = min(rows.max_seqlen_q, triton.cdiv(chosen.block_m, group) + 1)
    columns = scores.reach(together, rows.max_seqlen_k) + chosen.block_n - 1
    splits, width = split(blocks * kv_heads * batch, min(columns, rows.max_seqlen_k), chosen.block_n, q.device)
    return (blocks, kv_heads * splits, batch), splits, width, _shape(q, group, chosen, scores)


def _shape(q: Tensor, group: int, chosen, scores: Scores) -> dict:
    head_dim = q.shape[-1]
    return dict(
        G=group, D=head_dim, BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        **options(scores), num_warps=chosen.num_warps, num_stages=chosen.num_stages, **LAUNCH_OPTIONS,
    )  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of all dimensions but the last, which has stride 1."""
    return [stride for tensor in tensors for stride in tensor.stride()[:-1]]
