"""What the last agent of some rows reads behind, whichever engine decodes its answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index

from torch import Tensor

from diffmas.agents.controls import Control, HandedOver, behind
from diffmas.agents.positions import check_rows
from diffmas.agents.room import check_decoding
from diffmas.agents.trajectory import Trajectory
from diffmas.generation.decoding import Decoding
from diffmas.models.agent_model import Lengths
from diffmas_ops import KVTrace


def batches(size: int, batch_size: int) -> Iterator[list[int]]:
    """Indices in batches; a last batch of one joins its predecessor, so that every row has another beside it."""
    starts = list(range(0, size, batch_size))
    if len(starts) > 1 and size - starts[-1] == 1:
        starts.pop()
    for begin, end in zip(starts, [*starts[1:], size], strict=True):
        yield list(range(begin, end))


def checked_seeds(
    trajectory: Trajectory,
    prompt_ids: Sequence[Tensor],
    prompt_lengths: Sequence[Lengths],
    decoding: Decoding,
    seeds: Sequence[int] | None,
    control: Control | None,
) -> list[int]:
    """The rows' seeds, `decoding.seed + row` by default; arguments as for :class:`~diffmas.generation.Engine`.

    Raises:
        ValueError: prompts or seeds that do not fit, or memory that the traces do not fit in, named.
        UnsupportedModelError: more positions than the model has code for.
    """
    trajectory.check(prompt_ids, prompt_lengths)
    rows = len(prompt_lengths[0])
    found = [decoding.seed + row for row in range(rows)] if seeds is None else [index(seed) for seed in seeds]
    if len(found) != rows or min(found) < 0:
        raise ValueError(f"seeds is {found}; allowed: {rows} integers ≥ 0, one per row")
    check_decoding(trajectory, prompt_lengths, decoding, all_rows=control is not None)
    check_rows(trajectory, prompt_lengths, [decoding.max_new_tokens] * rows, "an answer of max_new_tokens")
    return found


def received(
    trajectory: Trajectory,
    prompt_ids: Sequence[Tensor],
    prompt_lengths: Sequence[Lengths],
    seeds: Sequence[int],
    control: Control | None = None,
    reserve: Lengths | None = None,
) -> KVTrace:
    """What the rows' last agent attends to before its own prompt, once `control` has been at it.

    Args:
        prompt_ids, prompt_lengths, reserve: as :meth:`~diffmas.agents.trajectory.Trajectory.communicate` takes them.
        seeds: one a row, of the control.
    """
    topology = trajectory.topology
    acting = control and behind(topology.sink_of(topology.last), control)

    def changed(handed: HandedOver) -> HandedOver:
        return acting(handed, seeds) if acting else handed

    return trajectory.communicate(prompt_ids, prompt_lengths, reserve, changed).trace
