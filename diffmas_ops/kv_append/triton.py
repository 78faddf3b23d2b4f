"""`kv_append` and `kv_gather` in Triton: one kernel, K and V together, copying between packed tokens and a trace."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffmas_ops.rows import RowRanges
from diffmas_ops.triton_device import LAUNCH_OPTIONS, launch_on

_TILE = 8192  # elements of k, and of v, that a program moves


@triton.jit
def _copy(
    packed_k, packed_v, keys, values, q_begin, q_end, starts,
    k_t, k_h, v_t, v_h, keys_b, keys_h, keys_c, values_b, values_h, values_c,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, INTO_TRACE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    begin = tl.load(q_begin + row)
    count = tl.load(q_end + row) - begin
    first = tl.program_id(0) * BLOCK_T
    if first < count:
        i = first + tl.arange(0, BLOCK_T)
        d = tl.arange(0, BLOCK_D)[None, :]
        inside = (i < count)[:, None] & (d < D)
        token = (begin + i).to(tl.int64)[:, None]
        column = (tl.load(starts + row) + i).to(tl.int64)[:, None]
        k = packed_k + token * k_t + head * k_h + d
        v = packed_v + token * v_t + head * v_h + d
        key = keys + row * keys_b + head * keys_h + column * keys_c + d
        value = values + row * values_b + head * values_h + column * values_c + d
        if INTO_TRACE:
            tl.store(key, tl.load(k, mask=inside), mask=inside)
            tl.store(value, tl.load(v, mask=inside), mask=inside)
        else:
            tl.store(k, tl.load(key, mask=inside).to(k.dtype.element_ty), mask=inside)
            tl.store(v, tl.load(value, mask=inside).to(v.dtype.element_ty), mask=inside)


def _launch(k, v, keys, values, rows, into_trace):
    batch, heads, _, head_dim = keys.shape
    # Two tile heights, not one per length: a new one is a compilation in the middle of somebody's training.
    block_d = triton.next_power_of_2(head_dim)
    block = 1 if rows.max_seqlen_q == 1 else max(_TILE // block_d, 1)
    with launch_on(keys):
        _copy[triton.cdiv(rows.max_seqlen_q, block), heads, batch](
            k, v, keys, values, *rows[:3],
            *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3], *values.stride()[:3],
            D=head_dim, BLOCK_T=block, BLOCK_D=block_d, INTO_TRACE=into_trace,
            **LAUNCH_OPTIONS,
        )  # fmt: skip


def kv_append(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: RowRanges,
) -> None:
    """See `reference.kv_append`."""
    _launch(k, v, keys, values, rows, True)


def kv_gather(
    keys: Tensor,
    values: Tensor,
    rows: RowRanges,
    total: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `reference.kv_gather`."""
    shape = (total, keys.shape[1], keys.shape[3])
    k, v = (torch.zeros(shape, dtype=dtype, device=keys.device) for _ in range(2))
    _launch(k, v, keys, values, rows, False)
    return k, v
