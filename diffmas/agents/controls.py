"""Trace controls: what the last agent answers when the trace it attends to carries no message of its own row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffmas_ops import KVTrace

Control = Callable[[KVTrace, Sequence[int]], KVTrace]


def behind(columns: int, control: Control) -> Control:
    """`control` of what stands behind the first `columns`: those, a sink, stay every row's own."""

    def controlled(trace: KVTrace, seeds: Sequence[int]) -> KVTrace:
        own = [buffer[:, :, :, :columns].clone() for buffer in trace.storage.buffers()]
        trace = control(trace, seeds)
        for buffer, sink in zip(trace.storage.buffers(), own, strict=True):
            buffer[:, :, :, :columns] = sink
        return trace

    return controlled if columns else control


def matched(trace: KVTrace, seeds: Sequence[int]) -> KVTrace:
    """The row's own trace."""
    return trace


def mismatched(trace: KVTrace, seeds: Sequence[int]) -> KVTrace:
    """The trace of another row of the batch: the next one that is not the same as its own, where there is one."""
    if trace.batch < 2:
        raise ValueError(f"batch is {trace.batch}; allowed: ≥ 2, a mismatched trace needs another row")
    return trace.select_rows([_other(trace, row) for row in range(trace.batch)])


def _other(trace: KVTrace, row: int) -> int:
    behind = [(row + step) % trace.batch for step in range(1, trace.batch)]
    return next((other for other in behind if not _same(trace, row, other)), behind[0])


def _same(trace: KVTrace, row: int, other: int) -> bool:
    length = trace.host_lengths[row]
    if length != trace.host_lengths[other] or not all(torch.equal(x[row], x[other]) for x in trace.states):
        return False
    return all(torch.equal(x[:, row, :, :length], x[:, other, :, :length]) for x in trace.storage.buffers())


def zero(trace: KVTrace, seeds: Sequence[int]) -> KVTrace:
    """Keys, values and what recurrent layers remember, of zero."""
    for buffer in (*trace.storage.buffers(), *trace.states):
        buffer.zero_()
    return trace


def noise(trace: KVTrace, seeds: Sequence[int]) -> KVTrace:
    """Gaussian keys, values and recurrent states with the norms of the row's own; a row's depend on its seed alone."""
    for row, (seed, length) in enumerate(zip(seeds, trace.host_lengths, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        columns = [buffer[:, row, :, :length] for buffer in trace.storage.buffers()]
        for written in (*columns, *(state[row] for state in trace.states)):
            written.copy_(_like_norm(written, generator))
    return trace


def _like_norm(x: Tensor, generator: torch.Generator) -> Tensor:
    # What fills values up to the size of keys is no part of them: noise there would take its share of the norm.
    drawn = torch.randn(x.shape, generator=generator).to(x.device) * (x != 0)
    return drawn * (x.float().norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-30))


CONTROLS: dict[str, Control] = {"matched": matched, "mismatched": mismatched, "zero": zero, "noise": noise}
