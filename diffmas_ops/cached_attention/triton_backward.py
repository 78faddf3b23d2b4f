"""The Triton backward kernels; formulas of FlashAttention-2 (arXiv 2307.08691, section 2.3).

dQ is computed by blocks of queries that walk over columns, dK and dV by blocks of columns that walk over queries and
add straight into the accumulators: every sum has one owner and one order.
"""

import triton
import triton.language as tl

from diffmas_ops.cached_attention.triton_forward import load_rows, query_block
from diffmas_ops.cached_attention.triton_scores import LOG2E, cap, queries_seeing, sees, through_cap


@triton.jit
def _probabilities(products, lse, scale, softcap, CAPPED: tl.constexpr):
    """Scores in natural units, where they are capped, and probabilities; `lse` in powers of two."""
    scores = products
    if CAPPED:
        scores = cap(products * scale, softcap, CAPPED)
        p = tl.exp2(scores * LOG2E - lse)
    else:
        p = tl.exp2(products * (scale * LOG2E) - lse)
    return scores, p


@triton.jit
def _walk_columns(
    acc, q, grad, lse, delta, keys, values, keys_c, values_c, position, first, last, scale, window, chunk, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LOCAL: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    for n in range(first, last, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        present = column < last
        wide = column.to(tl.int64)
        k = load_rows(keys, wide * keys_c, present, D, BLOCK_D, MASKED)
        v = load_rows(values, wide * values_c, present, D, BLOCK_D, MASKED)
        scores, p = _probabilities(tl.dot(q, tl.trans(k), input_precision="ieee"), lse[:, None], scale, softcap, CAPPED)
        if MASKED:
            p = tl.where(sees(position[:, None], column[None, :], window, chunk, LOCAL), p, 0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_scores = through_cap(p * (grad_p - delta[:, None]), scores, softcap, CAPPED)
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["splits", "width", "window", "chunk"])
def queries_kernel(
    grad_out, q, out, lse, keys, values, grad_q, delta, q_begin, q_end, starts, splits, width, scale,
    window, chunk, softcap,
    grad_t, grad_h, q_t, q_h, out_t, out_h, lse_t, keys_b, keys_h, keys_c, values_b, values_h, values_c,
    grad_q_s, grad_q_t, grad_q_h, delta_t,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOCAL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """`grad_q [S, T, Hq, D]`, what each part of the columns adds (zero for an empty part), and `delta [T, Hq]`."""
    some, row, kv_head, part, token, head, present, position, first, unmasked, last = query_block(
        q_begin, q_end, starts, splits, width, window, chunk, G, BLOCK_M, BLOCK_N, LOCAL
    )
    if some:
        keys += row * keys_b + kv_head * keys_h
        values += row * values_b + kv_head * values_h
        queries = load_rows(q, token * q_t + head * q_h, present, D, BLOCK_D, True)
        grad = load_rows(grad_out, token * grad_t + head * grad_h, present, D, BLOCK_D, True)
        outs = load_rows(out, token * out_t + head * out_h, present, D, BLOCK_D, True)
        row_delta = tl.sum(outs.to(tl.float32) * grad.to(tl.float32), 1)
        if part == 0:
            tl.store(delta + token * delta_t + head, row_delta, mask=present)
        row_lse = tl.load(lse + token * lse_t + head, mask=present, other=0.0) * LOG2E
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        acc = _walk_columns(
            acc, queries, grad, row_lse, row_delta, keys, values, keys_c, values_c, position, first, unmasked,
            scale, window, chunk, softcap, D, BLOCK_N, BLOCK_D, LOCAL, CAPPED, False,
        )  # fmt: skip
        acc = _walk_columns(
            acc, queries, grad, row_lse, row_delta, keys, values, keys_c, values_c, position, unmasked, last,
            scale, window, chunk, softcap, D, BLOCK_N, BLOCK_D, LOCAL, CAPPED, True,
        )  # fmt: skip
        d = tl.arange(0, BLOCK_D)[None, :]
        at = grad_q + part * grad_q_s + token[:, None] * grad_q_t + head[:, None] * grad_q_h + d
        tl.store(at, (acc * scale).to(grad_q.dtype.element_ty), mask=present[:, None] & (d < D))


@triton.jit
def _walk_queries(
    grad_k, grad_v, k, v, grad_out, q, lse, delta, begin, start, kv_head, rows, first, last, column, scale,
    window, chunk, softcap, grad_t, grad_h, q_t, q_h, lse_t, delta_t,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, LOCAL: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for m0 in range(first, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        present = m < rows
        i = m // G
        token = (begin + i).to(tl.int64)
        head = kv_head * G + m % G
        queries = load_rows(q, token * q_t + head * q_h, present, D, BLOCK_D, True)
        grad = load_rows(grad_out, token * grad_t + head * grad_h, present, D, BLOCK_D, True)
        # +inf makes the probability of a query that is not there exactly 0.
        row_lse = tl.load(lse + token * lse_t + head, mask=present, other=float("inf")) * LOG2E
        row_delta = tl.load(delta + token * delta_t + head, mask=present, other=0.0)
        products = tl.dot(k, tl.trans(queries), input_precision="ieee")
        scores, p = _probabilities(products, row_lse[None, :], scale, softcap, CAPPED)
        if MASKED:
            p = tl.where(sees((start + i)[None, :], column[:, None], window, chunk, LOCAL), p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision="ieee")
        grad_p = tl.dot(v, tl.trans(grad), input_precision="ieee")
        grad_scores = through_cap(p * (grad_p - row_delta[None, :]), scores, softcap, CAPPED)
        grad_k = tl.dot(grad_scores.to(queries.dtype), queries, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=["window", "chunk"])
def columns_kernel(
    grad_out, q, lse, delta, keys, values, grad_keys, grad_values,
    q_begin, q_end, starts, column_begin, column_end, scale, window, chunk, softcap,
    grad_t, grad_h, q_t, q_h, lse_t, delta_t, keys_b, keys_h, keys_c, values_b, values_h, values_c,
    gk_b, gk_h, gk_c, gv_b, gv_h, gv_c,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOCAL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Add what a row's queries owe to one block of its columns, a `(blocks, kv heads, rows)` grid."""
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    begin = tl.load(q_begin + row)
    rows = (tl.load(q_end + row) - begin) * G
    start = tl.load(starts + row)
    first_column = tl.load(column_begin + row) + tl.program_id(0) * BLOCK_N
    end = tl.load(column_end + row)
    # Query rows before `first` see nothing of the block; from `unmasked` on they see all of it.
    first = tl.maximum(first_column - start, 0) * G
    rows = queries_seeing(tl.minimum(first_column + BLOCK_N, end) - 1, start, rows // G, window, chunk, LOCAL) * G
    if (first_column < end) & (first < rows):
        seen_by_all = tl.maximum(tl.minimum(first_column + BLOCK_N, end) - 1 - start, 0) * G
        unmasked = tl.minimum(first + tl.cdiv(seen_by_all - first, BLOCK_M) * BLOCK_M, rows)
        if LOCAL:
            unmasked = rows
        column = first_column + tl.arange(0, BLOCK_N)
        wide = column.to(tl.int64)
        inside = column < end
        k = load_rows(keys + row * keys_b + kv_head * keys_h, wide * keys_c, inside, D, BLOCK_D, True)
        v = load_rows(values + row * values_b + kv_head * values_h, wide * values_c, inside, D, BLOCK_D, True)
        grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_k, grad_v = _walk_queries(
            grad_k, grad_v, k, v, grad_out, q, lse, delta, begin, start, kv_head, rows, first, unmasked, column,
            scale, window, chunk, softcap, grad_t, grad_h, q_t, q_h, lse_t, delta_t, G, D, BLOCK_M, BLOCK_D, LOCAL,
            CAPPED, True,
        )  # fmt: skip
        grad_k, grad_v = _walk_queries(
            grad_k, grad_v, k, v, grad_out, q, lse, delta, begin, start, kv_head, rows, unmasked, rows, column,
            scale, window, chunk, softcap, grad_t, grad_h, q_t, q_h, lse_t, delta_t, G, D, BLOCK_M, BLOCK_D, LOCAL,
            CAPPED, False,
        )  # fmt: skip
        d = tl.arange(0, BLOCK_D)[None, :]
        mask = inside[:, None] & (d < D)
        gk = grad_keys + row * gk_b + kv_head * gk_h + wide[:, None] * gk_c + d
        gv = grad_values + row * gv_b + kv_head * gv_h + wide[:, None] * gv_c + d
        tl.store(gk, tl.load(gk, mask=mask) + grad_k * scale, mask=mask)
        tl.store(gv, tl.load(gv, mask=mask) + grad_v, mask=mask)


@triton.jit
def _owe(q, grad, lse, delta, k, v, scale, softcap, CAPPED: tl.constexpr):
    """What query rows `q [M, D]` that see it owe to one column: gradients of its key (over scale) and value, `[D]`."""
    q, grad = q.to(tl.float32), grad.to(tl.float32)
    scores = cap(tl.sum(q * k[None, :], 1) * scale, softcap, CAPPED)
    p = tl.exp2((scores - lse) * LOG2E)
    grad_scores = through_cap(p * (tl.sum(grad * v[None, :], 1) - delta), scores, softcap, CAPPED)
    return tl.sum(grad_scores[:, None] * q, 0), tl.sum(p[:, None] * grad, 0)


@triton.jit(do_not_specialize=["splits", "slots", "window", "chunk"])
def token_kernel(
    partial_grad_q, grad_out, q, lse, delta, keys, values, grad_keys, grad_values, grad_q, grad_k, grad_v,
    pending_q, pending_grad, pending_lse, pending_delta, pending_starts, q_begin, q_end, starts, splits, slots, scale,
    window, chunk, softcap,
    part_s, part_t, part_h, grad_t, grad_h, q_t, q_h, lse_t, delta_t,
    keys_b, keys_h, keys_c, values_b, values_h, values_c, gk_b, gk_h, gk_c, gv_b, gv_h, gv_c,
    pq_b, pq_p, pq_h, pg_b, pg_p, pg_h, pl_b, pl_p, pd_b, pd_p,
    G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    LOCAL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Finish a single-token call: sum dQ over the parts, put its rows on the pending list, read out its own column."""
    kv_head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    begin = tl.load(q_begin + row)
    count = tl.load(q_end + row) - begin
    token = begin.to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    head = kv_head * G + g
    present = g < count * G
    d = tl.arange(0, BLOCK_D)
    inside = (g < G)[:, None] & (d < D)[None, :]

    if count > 0:
        queries = load_rows(q, token * q_t + head * q_h, present, D, BLOCK_D, True)
        grad = load_rows(grad_out, token * grad_t + head * grad_h, present, D, BLOCK_D, True)
        row_lse = tl.load(lse + token * lse_t + head, mask=present, other=float("inf"))
        row_delta = tl.load(delta + token * delta_t + head, mask=present, other=0.0)
        slot = tl.load(starts + row) - tl.load(pending_starts + row)
        at_slot = slot.to(tl.int64)
        to_q = pending_q + row * pq_b + at_slot * pq_p + head[:, None] * pq_h + d[None, :]
        to_grad = pending_grad + row * pg_b + at_slot * pg_p + head[:, None] * pg_h + d[None, :]
        tl.store(to_q, queries, mask=inside)
        tl.store(to_grad, grad, mask=inside)
        tl.store(pending_lse + row * pl_b + at_slot * pl_p + head, row_lse, mask=g < G)
        tl.store(pending_delta + row * pd_b + at_slot * pd_p + head, row_delta, mask=g < G)

        total = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        parts = partial_grad_q + token * part_t + head[:, None] * part_h + d[None, :]
        for _ in range(splits):
            total += tl.load(parts, mask=inside, other=0.0)
            parts += part_s
        heads = tl.num_programs(0) * G
        at_q = grad_q + (token * heads + head)[:, None] * D + d[None, :]
        tl.store(at_q, total.to(grad_q.dtype.element_ty), mask=inside)

        column = tl.load(starts + row).to(tl.int64)
        k = tl.load(keys + row * keys_b + kv_head * keys_h + column * keys_c + d, mask=d < D, other=0.0)
        v = tl.load(values + row * values_b + kv_head * values_h + column * values_c + d, mask=d < D, other=0.0)
        k, v = k.to(tl.float32), v.to(tl.float32)
        own_k, own_v = _owe(queries, grad, row_lse, row_delta, k, v, scale, softcap, CAPPED)
        # A slot further on stands a column further on.
        at = tl.load(starts + row)
        seeing = queries_seeing(at, at - slot, slots, window, chunk, LOCAL) * G
        for m0 in range((slot + 1) * G, seeing, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            later = m < seeing
            later_slot = (m // G).to(tl.int64)
            later_head = kv_head * G + m % G
            more_k, more_v = _owe(
                load_rows(pending_q + row * pq_b, later_slot * pq_p + later_head * pq_h, later, D, BLOCK_D, True),
                load_rows(pending_grad + row * pg_b, later_slot * pg_p + later_head * pg_h, later, D, BLOCK_D, True),
                tl.load(pending_lse + row * pl_b + later_slot * pl_p + later_head, mask=later, other=float("inf")),
                tl.load(pending_delta + row * pd_b + later_slot * pd_p + later_head, mask=later, other=0.0),
                k, v, scale, softcap, CAPPED,
            )  # fmt: skip
            own_k += more_k
            own_v += more_v
        own_k = own_k * scale + tl.load(
            grad_keys + row * gk_b + kv_head * gk_h + column * gk_c + d, mask=d < D, other=0.0
        )
        own_v += tl.load(grad_values + row * gv_b + kv_head * gv_h + column * gv_c + d, mask=d < D, other=0.0)
        at_k = (token * tl.num_programs(0) + kv_head) * D + d
        tl.store(grad_k + at_k, own_k.to(grad_k.dtype.element_ty), mask=d < D)
        tl.store(grad_v + at_k, own_v.to(grad_v.dtype.element_ty), mask=d < D)
