"""Combination of attention results over disjoint sets of keys."""

from __future__ import annotations

from torch import Tensor

from diffmas_ops import backends
from diffmas_ops.dtypes import accumulation_dtype


def merge_states(outs: Tensor, lses: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Attention over the union of S key sets from the attention over each. Not differentiable.

    Args:
        outs: `[S, tokens, heads, head_dim]`.
        lses: `[S, tokens, heads]`, natural log of the sum of exponentials, float32 (float64 for float64 outs);
            -inf marks a set without keys.

    Returns:
        `out [tokens, heads, head_dim]` and `lse [tokens, heads]`.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, named.
    """
    if outs.dim() != 4 or outs.shape[0] == 0:
        raise ValueError(f"outs has shape {tuple(outs.shape)}; allowed: [S ≥ 1, tokens, heads, head_dim]")
    if lses.shape != outs.shape[:3]:
        raise ValueError(f"lses has shape {tuple(lses.shape)}; allowed: {tuple(outs.shape[:3])}")
    if lses.dtype != accumulation_dtype(outs.dtype):
        raise TypeError(f"lses is {lses.dtype}; allowed: {accumulation_dtype(outs.dtype)}")
    ops = backends.functions("merge_states", outs, backend)
    return ops.merge_states(outs.detach().contiguous(), lses.detach().contiguous())
