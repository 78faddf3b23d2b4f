"""`kv_concat` in plain PyTorch: the specification, any dtype, any device."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` dims of `x [..., D]` by the angles whose cosines and sines are given.

    `interleaved` pairs dims `(2d, 2d + 1)`, otherwise `(d, d + R/2)` (the half-split layout of Llama and Qwen).
    """
    half = cos.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def kv_concat(
    source_keys: list[Tensor],
    source_values: list[Tensor],
    keys: Tensor,
    values: Tensor,
    source_begin: Tensor,
    counts: Tensor,
    dest_begin: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    """Copy ragged segments of n senders' `[L, B, Hkv, C_i, D]` into `keys, values [L, B, Hkv, C, D]`, in place.

    `source_begin, counts, dest_begin` are int32 `[n, B]`; keys are rotated by `cos, sin [n, B, R/2]` on the way.
    """
    for i, row, source, dest in _segments(source_begin, counts, dest_begin):
        moved = source_keys[i][:, row, :, source]
        if cos is not None:
            moved = rotate(moved.to(cos.dtype), cos[i, row], sin[i, row], interleaved)
        keys[:, row, :, dest] = moved.to(keys.dtype)
        values[:, row, :, dest] = source_values[i][:, row, :, source].to(values.dtype)


def kv_concat_backward(
    grad_keys: Tensor,
    grad_values: Tensor,
    source_grad_keys: list[Tensor],
    source_grad_values: list[Tensor],
    source_begin: Tensor,
    counts: Tensor,
    dest_begin: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> None:
    """Rotate the gradient of every destination column back and add it to its sender's accumulators, in place."""
    for i, row, source, dest in _segments(source_begin, counts, dest_begin):
        moved = grad_keys[:, row, :, dest]
        if cos is not None:
            moved = rotate(moved, cos[i, row], -sin[i, row], interleaved)
        source_grad_keys[i][:, row, :, source] += moved
        source_grad_values[i][:, row, :, source] += grad_values[:, row, :, dest]


def _segments(source_begin: Tensor, counts: Tensor, dest_begin: Tensor):
    tables = source_begin.tolist(), counts.tolist(), dest_begin.tolist()
    for i, columns in enumerate(zip(*tables, strict=True)):
        for row, (source, count, dest) in enumerate(zip(*columns, strict=True)):
            yield i, row, slice(source, source + count), slice(dest, dest + count)
