"""`kv_append` and its inverse `kv_gather` in plain PyTorch: the specification, any dtype, any device."""

import torch
from torch import Tensor

from diffmas_ops.rows import RowRanges


def kv_append(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: RowRanges,
) -> None:
    """Write packed `k, v [T, Hkv, D]` into `keys, values [B, Hkv, C, D]` at the rows' columns, in place."""
    for row, (begin, end, start) in enumerate(on_host(*rows[:3])):
        keys[row, :, start : start + end - begin] = k[begin:end].transpose(0, 1)
        values[row, :, start : start + end - begin] = v[begin:end].transpose(0, 1)


def kv_gather(
    keys: Tensor,
    values: Tensor,
    rows: RowRanges,
    total: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The rows' columns as two packed `[total, Hkv, D]` tensors of `dtype`; unclaimed tokens are zero."""
    k = torch.zeros(total, keys.shape[1], keys.shape[3], dtype=dtype, device=keys.device)
    v = torch.zeros_like(k)
    for row, (begin, end, start) in enumerate(on_host(*rows[:3])):
        k[begin:end] = keys[row, :, start : start + end - begin].transpose(0, 1)
        v[begin:end] = values[row, :, start : start + end - begin].transpose(0, 1)
    return k, v


def on_host(*columns: Tensor):
    """Rows of int32 `[B]` tensors as tuples of Python integers."""
    return zip(*(column.tolist() for column in columns), strict=True)
