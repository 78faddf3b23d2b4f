"""`merge_states` in Triton: one pass over the log-sum-exps, one over the partial results, in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from diffmas_ops.triton_device import LAUNCH_OPTIONS, launch_on

_BLOCK_H = 4


@triton.jit(do_not_specialize=["sets"])
def _merge(
    outs, lses, out, lse, sets, heads,
    outs_s, outs_t, outs_h, lses_s, lses_t, out_t, out_h, lse_t,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (h < heads)[:, None] & (d < D)
    partial_lse = lses + token * lses_t + h
    partial = outs + token * outs_t + h[:, None] * outs_h + d

    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    for _ in range(sets):
        highest = tl.maximum(highest, tl.load(partial_lse, mask=h < heads, other=float("-inf")))
        partial_lse += lses_s
    # Without any key the differences below would be inf - inf.
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK_H], tl.float32)
    merged = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    partial_lse = lses + token * lses_t + h
    for _ in range(sets):
        weight = tl.exp(tl.load(partial_lse, mask=h < heads, other=float("-inf")) - reference)
        counts = inside & (weight > 0)[:, None]
        merged += weight[:, None] * tl.load(partial, mask=counts, other=0.0).to(tl.float32)
        total += weight
        partial_lse += lses_s
        partial += outs_s
    some = total > 0
    total = tl.where(some, total, 1.0)
    merged = merged / total[:, None]
    tl.store(out + token * out_t + h[:, None] * out_h + d, merged.to(out.dtype.element_ty), mask=inside)
    merged_lse = tl.where(some, reference + tl.log(total), float("-inf"))
    tl.store(lse + token * lse_t + h, merged_lse, mask=h < heads)


def merge_into(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge `outs [S, T, H, D], lses [S, T, H]` into `out [T, H, D], lse [T, H]`, whatever the dtype of `out`."""
    sets, tokens, heads, head_dim = outs.shape
    block = min(_BLOCK_H, triton.next_power_of_2(heads))
    with launch_on(outs):
        _merge[tokens, triton.cdiv(heads, block)](
            outs, lses, out, lse, sets, heads,
            *outs.stride()[:3], *lses.stride()[:2], *out.stride()[:2], lse.stride(0),
            D=head_dim, BLOCK_H=block, BLOCK_D=triton.next_power_of_2(head_dim), **LAUNCH_OPTIONS,
        )  # fmt: skip


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.merge_states`."""
    out, lse = outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
    merge_into(outs, lses, out, lse)
    return out, lse
