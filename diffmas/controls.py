"""Trace controls: what the last agent answers when the trace it attends to carries no message of its own row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffmas_ops import KVTrace

Control = Callable[[KVTrace, Sequence[int]], KVTrace]


def matched(trace: KVTrace, seeds: Sequence[int]) -> KVTrace:
    """The row's own trace."""
    return trace


def mismatched(trace: KVTrace, seeds: Sequence[int]) -> KVTrace:
    """The trace of another row of the batch."""
    if trace.batch < 2:
        raise ValueError(f"batch is {trace.batch}; allowed: ≥ 2, a mismatched trace needs another row")
    return trace.select_rows([*range(1, trace.batch), 0])


def zero(trace: KVTrace, seeds: Sequence[int]) -> KVTrace:
    """Keys and values of zero."""
    trace.keys.zero_()
    trace.values.zero_()
    return trace


def noise(trace: KVTrace, seeds: Sequence[int]) -> KVTrace:
    """Gaussian keys and values with the norms of the row's own; a row's noise depends on its seed alone."""
    for row, (seed, length) in enumerate(zip(seeds, trace.host_lengths, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        for buffer in (trace.keys, trace.values):
            written = buffer[:, row, :, :length]
            written.copy_(_like_norm(written, generator))
    return trace


def _like_norm(x: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(x.shape, generator=generator).to(x.device)
    return drawn * (x.float().norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


CONTROLS: dict[str, Control] = {"matched": matched, "mismatched": mismatched, "zero": zero, "noise": noise}
