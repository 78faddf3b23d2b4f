"""The Triton forward kernel: blocks of queries walk over the columns of their row, in the order of the columns.

The query heads of a group are stacked beside the tokens (query row m is token m // G, head m % G), so that a group
reads its keys and values once. Exponentials are in base 2 inside, the log-sum-exp leaves in natural log.
"""

import triton
import triton.language as tl

from diffmas_ops.cached_attention.triton_scores import LOG2E, cap, first_seen, sees


@triton.jit
def load_rows(pointer, offset, present, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """`[rows, BLOCK_D]` at `pointer + offset`, zero where (if MASKED) a row is not `present` and where d ≥ D."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + offset[:, None] + d[None, :]
    if MASKED:
        tile = tl.load(at, mask=present[:, None] & (d < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def query_block(
    q_begin, q_end, starts, splits, width, window, chunk,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Which queries and columns this program of a `(blocks, kv heads * splits, rows)` grid works on.

    Columns `first … unmasked - 1` are whole blocks that every query sees, `unmasked … last - 1` need the mask. A
    part is whole blocks (`width` is a multiple of BLOCK_N), so no block reaches into columns of the next one. The parts
    are of the columns that some query sees, which begin behind 0 where a window or a chunk is given.
    """
    # The last queries see most: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = (tl.program_id(1) // splits).to(tl.int64)
    part = tl.program_id(1) % splits
    row = tl.program_id(2).to(tl.int64)
    begin = tl.load(q_begin + row)
    count = tl.load(q_end + row) - begin
    start = tl.load(starts + row)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = m // G
    token = (begin + i).to(tl.int64)
    head = kv_head * G + m % G
    lowest = first_seen(start + (block * BLOCK_M) // G, window, chunk, LOCAL) // BLOCK_N * BLOCK_N
    first = lowest + part * width
    seen_by_all = start + (block * BLOCK_M) // G + 1
    seen_by_any = start + tl.minimum(count, (block * BLOCK_M + BLOCK_M - 1) // G + 1)
    last = tl.minimum(seen_by_any, first + width)
    unmasked = first + tl.maximum(tl.minimum(last, seen_by_all) - first, 0) // BLOCK_N * BLOCK_N
    if LOCAL:
        unmasked = first
    some = block * BLOCK_M < count * G
    return some, row, kv_head, part.to(tl.int64), token, head, i < count, start + i, first, unmasked, last


@triton.jit
def _attend(
    acc, total, highest, q, keys, values, keys_c, values_c, position, first, last, scale, unit, window, chunk, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LOCAL: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    for n in range(first, last, BLOCK_N):
        column = n + tl.arange(0, BLOCK_N)
        present = column < last
        wide = column.to(tl.int64)
        k = load_rows(keys, wide * keys_c, present, D, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAPPED:
            scores = cap(scores * scale, softcap, CAPPED)
        if MASKED:
            seen = sees(position[:, None], column[None, :], window, chunk, LOCAL)
            scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        reference = new_highest
        if MASKED:
            # A query that sees nothing of this part yet: -inf - -inf would be NaN.
            reference = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        # The unit enters with the subtraction, one multiply-add a score.
        p = tl.exp2(scores * unit - (reference * unit)[:, None])
        shrink = tl.exp2((highest - reference) * unit)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(values, wide * values_c, present, D, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = new_highest
    return acc, total, highest


@triton.jit(do_not_specialize=["splits", "width", "window", "chunk"])
def forward_kernel(
    q, keys, values, out, lse, q_begin, q_end, starts, splits, width, scale, window, chunk, softcap,
    q_t, q_h, keys_b, keys_h, keys_c, values_b, values_h, values_c, out_s, out_t, out_h, lse_s, lse_t,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LOCAL: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """`out [S, T, Hq, D], lse [S, T, Hq]` of each part of the columns; -inf where a query sees nothing of a part.

    `scale` is positive: the highest score is looked for before scaling.
    """
    some, row, kv_head, part, token, head, present, position, first, unmasked, last = query_block(
        q_begin, q_end, starts, splits, width, window, chunk, G, BLOCK_M, BLOCK_N, LOCAL
    )
    if some:
        keys += row * keys_b + kv_head * keys_h
        values += row * values_b + kv_head * values_h
        queries = load_rows(q, token * q_t + head * q_h, present, D, BLOCK_D, True)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        # Scores that are capped have been scaled already.
        unit = scale
        if CAPPED:
            unit = 1.0
        acc, total, highest = _attend(
            acc, total, highest, queries, keys, values, keys_c, values_c, position, first, unmasked, scale,
            unit * LOG2E, window, chunk, softcap, D, BLOCK_N, BLOCK_D, LOCAL, CAPPED, False,
        )  # fmt: skip
        acc, total, highest = _attend(
            acc, total, highest, queries, keys, values, keys_c, values_c, position, unmasked, last, scale,
            unit * LOG2E, window, chunk, softcap, D, BLOCK_N, BLOCK_D, LOCAL, CAPPED, True,
        )  # fmt: skip
        nothing = highest == float("-inf")
        d = tl.arange(0, BLOCK_D)[None, :]
        total = tl.where(nothing, 1.0, total)
        acc = acc / total[:, None]
        at = out + part * out_s + token[:, None] * out_t + head[:, None] * out_h + d
        tl.store(at, acc.to(out.dtype.element_ty), mask=present[:, None] & (d < D))
        natural = tl.where(nothing, float("-inf"), highest * unit + tl.log(total))
        tl.store(lse + part * lse_s + token * lse_t + head, natural, mask=present)
