"""`kv_append` and its inverse `kv_gather` in plain PyTorch: the specification, any dtype, any device."""

import torch
from torch import Tensor


def kv_append(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    q_begin: Tensor,
    q_end: Tensor,
    starts: Tensor,
    max_new: int,
) -> None:
    """Write packed `k, v [T, Hkv, D]` into `keys, values [B, Hkv, C, D]` at columns `starts[b] + i`, in place."""
    for row, (begin, end, start) in enumerate(row_ranges(q_begin, q_end, starts)):
        keys[row, :, start : start + end - begin] = k[begin:end].transpose(0, 1)
        values[row, :, start : start + end - begin] = v[begin:end].transpose(0, 1)


def kv_gather(
    keys: Tensor,
    values: Tensor,
    q_begin: Tensor,
    q_end: Tensor,
    starts: Tensor,
    max_new: int,
    total: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Columns `starts[b] + i` as two packed `[total, Hkv, D]` tensors of `dtype`; unclaimed tokens are zero."""
    k = torch.zeros(total, keys.shape[1], keys.shape[3], dtype=dtype, device=keys.device)
    v = torch.zeros_like(k)
    for row, (begin, end, start) in enumerate(row_ranges(q_begin, q_end, starts)):
        k[begin:end] = keys[row, :, start : start + end - begin].transpose(0, 1)
        v[begin:end] = values[row, :, start : start + end - begin].transpose(0, 1)
    return k, v


def row_ranges(*columns: Tensor):
    """Rows of int32 `[B]` tensors as tuples of Python integers."""
    return zip(*(column.tolist() for column in columns), strict=True)
