"""`kv_concat` and its backward in Triton: one launch per sender moves the keys and values of all layers."""

import triton
import triton.language as tl
from torch import Tensor

from diffmas_ops.triton_device import LAUNCH_OPTIONS, launch_on

_TILE = 4096  # elements of keys, and of values, that a program moves


@triton.jit
def _put(pointer, value, mask, ADD: tl.constexpr):
    if ADD:
        value += tl.load(pointer, mask=mask)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _move(
    from_keys, from_values, to_keys, to_values, from_begin, to_begin, counts, cos, sin, heads,
    fk_l, fk_b, fk_h, fk_c, fv_l, fv_b, fv_h, fv_c, tk_l, tk_b, tk_h, tk_c, tv_l, tv_b, tv_h, tv_c,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    count = tl.load(counts + row)
    first = tl.program_id(0) * BLOCK_C
    if first < count:
        j = first + tl.arange(0, BLOCK_C)
        source = (tl.load(from_begin + row) + j).to(tl.int64)[:, None]
        dest = (tl.load(to_begin + row) + j).to(tl.int64)[:, None]
        from_key = from_keys + layer * fk_l + row * fk_b + head * fk_h + source * fk_c
        from_value = from_values + layer * fv_l + row * fv_b + head * fv_h + source * fv_c
        to_key = to_keys + layer * tk_l + row * tk_b + head * tk_h + dest * tk_c
        to_value = to_values + layer * tv_l + row * tv_b + head * tv_h + dest * tv_c
        present = (j < count)[:, None]

        d = tl.arange(0, BLOCK_D)[None, :]
        inside = present & (d < D)
        _put(to_value + d, tl.load(from_value + d, mask=inside), inside, BACKWARD)
        still = inside & (d >= 2 * HALF)
        if 2 * HALF < D:
            _put(to_key + d, tl.load(from_key + d, mask=still), still, BACKWARD)
        if HALF > 0:
            r = tl.arange(0, BLOCK_HALF)[None, :]
            turning = r < HALF
            c = tl.load(cos + row * HALF + r, mask=turning)
            s = tl.load(sin + row * HALF + r, mask=turning)
            if BACKWARD:
                s = -s
            a = r * 2 if INTERLEAVED else r
            b = a + (1 if INTERLEAVED else HALF)
            turning = turning & present
            x = tl.load(from_key + a, mask=turning).to(tl.float32)
            y = tl.load(from_key + b, mask=turning).to(tl.float32)
            _put(to_key + a, x * c - y * s, turning, BACKWARD)
            _put(to_key + b, y * c + x * s, turning, BACKWARD)


def _launch(i, froms, tos, from_begin, to_begin, counts, cos, sin, interleaved, backward):
    layers, batch, heads, columns, head_dim = froms[0].shape
    columns = min(columns, tos[0].shape[3])
    half = 0 if cos is None else cos.shape[-1]
    block_d = triton.next_power_of_2(head_dim)
    block_c = max(_TILE // block_d, 1)
    with launch_on(froms[0]):
        _move[triton.cdiv(columns, block_c), batch * heads, layers](
            *froms, *tos, from_begin[i], to_begin[i], counts[i],
            None if cos is None else cos[i], None if sin is None else sin[i], heads,
            *(stride for tensor in (*froms, *tos) for stride in tensor.stride()[:4]),
            D=head_dim, HALF=half, INTERLEAVED=interleaved, BACKWARD=backward,
            BLOCK_C=block_c, BLOCK_D=block_d, BLOCK_HALF=triton.next_power_of_2(max(half, 1)), **LAUNCH_OPTIONS,
        )  # fmt: skip


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
    """See `reference.kv_concat`."""
    for i, froms in enumerate(zip(source_keys, source_values, strict=True)):
        _launch(i, froms, (keys, values), source_begin, dest_begin, counts, cos, sin, interleaved, False)


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
    """See `reference.kv_concat_backward`."""
    for i, tos in enumerate(zip(source_grad_keys, source_grad_values, strict=True)):
        _launch(i, (grad_keys, grad_values), tos, dest_begin, source_begin, counts, cos, sin, interleaved, True)
