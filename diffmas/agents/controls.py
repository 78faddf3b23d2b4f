"""Trace controls: what the last agent answers when what it was handed carries no message of its own row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffmas.agents.trajectory import HandedOver

Control = Callable[[HandedOver, Sequence[int]], HandedOver]


def behind(columns: int, control: Control) -> Control:
    """`control` of what stands behind the first `columns`: those, a sink, stay every row's own."""

    def controlled(handed: HandedOver, seeds: Sequence[int]) -> HandedOver:
        own = [buffer[:, :, :, :columns].clone() for buffer in handed.trace.storage.buffers()]
        handed = control(handed, seeds)
        for buffer, sink in zip(handed.trace.storage.buffers(), own, strict=True):
            buffer[:, :, :, :columns] = sink
        return handed

    return controlled if columns else control


def matched(handed: HandedOver, seeds: Sequence[int]) -> HandedOver:
    """What the row's own agents handed over."""
    return handed


def mismatched(handed: HandedOver, seeds: Sequence[int]) -> HandedOver:
    """What was handed to another row of the batch: the next one where it is not the same, if there is one."""
    trace = handed.trace
    if trace.batch < 2:
        raise ValueError(f"batch is {trace.batch}; allowed: ≥ 2, a mismatched trace needs another row")
    rows = [_other(handed, row) for row in range(trace.batch)]
    return HandedOver(trace.select_rows(rows), [x.of_rows(rows) for x in handed.states])


def _other(handed: HandedOver, row: int) -> int:
    batch = handed.trace.batch
    behind = [(row + step) % batch for step in range(1, batch)]
    return next((other for other in behind if not _same(handed, row, other)), behind[0])


def _same(handed: HandedOver, row: int, other: int) -> bool:
    trace = handed.trace
    length = trace.host_lengths[row]
    if length != trace.host_lengths[other]:
        return False
    if not all(torch.equal(x[row], x[other]) for x in (*trace.states, *(x.rows() for x in handed.states))):
        return False
    return all(torch.equal(x[:, row, :, :length], x[:, other, :, :length]) for x in trace.storage.buffers())


def zero(handed: HandedOver, seeds: Sequence[int]) -> HandedOver:
    """Keys, values, hidden states and what recurrent layers remember, of zero."""
    for buffer in (*handed.trace.storage.buffers(), *handed.trace.states):
        buffer.zero_()
    return HandedOver(handed.trace, [replace(x, packed=torch.zeros_like(x.packed)) for x in handed.states])


def noise(handed: HandedOver, seeds: Sequence[int]) -> HandedOver:
    """Gaussian ones with the norms of the row's own; a row's depend on its seed alone."""
    handed = HandedOver(handed.trace, [replace(x, packed=x.packed.clone()) for x in handed.states])
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for written in _of_row(handed, row):
            written.copy_(_like_norm(written, generator))
    return handed


def _of_row(handed: HandedOver, row: int) -> Iterator[Tensor]:
    trace = handed.trace
    length = trace.host_lengths[row]
    yield from (buffer[:, row, :, :length] for buffer in trace.storage.buffers())
    yield from (state[row] for state in (*trace.states, *(x.rows() for x in handed.states)))


def _like_norm(x: Tensor, generator: torch.Generator) -> Tensor:
    # What fills values up to the size of keys is no part of them: noise there would take its share of the norm.
    drawn = torch.randn(x.shape, generator=generator).to(x.device) * (x != 0)
    return drawn * (x.float().norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-30))


CONTROLS: dict[str, Control] = {"matched": matched, "mismatched": mismatched, "zero": zero, "noise": noise}
