"""Rows whose senders have run: what an engine elsewhere needs to decode the last agent's answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffmas.agents.controls import Control
from diffmas.generation.decoding import Decoding
from diffmas.generation.received import batches, checked_seeds, received
from diffmas.models.adapters import WithAdapter
from diffmas.models.agent_model import AgentModel, Lengths, evaluating
from diffmas.serving.traces import StoredTrace, TraceStore
from diffmas.serving.weights import Adapter
from diffmas.system import MultiAgentSystem

#: Tokens whose log-probabilities a probe keeps.
_PROBED = 5


@dataclass(frozen=True)
class Row:
    """One row before its first answer token.

    Attributes:
        prompt: the last agent's, token ids.
        seed: of its samples.
        trace: what the prompt stands behind; None: nothing.
        adapter: what the last agent runs with; None: the base model.
        seconds: that its senders took, with those of the rows they ran beside; beside: how many, itself among them.
        probe: of the likeliest first tokens of an answer, the log-probabilities that this process finds: an engine that
            finds others does not read what was written.
    """

    prompt: tuple[int, ...]
    seed: int
    trace: StoredTrace | None
    adapter: Adapter | None
    seconds: float
    beside: int = 1
    probe: dict[int, float] | None = None

    @property
    def length(self) -> int:
        """Columns of its trace and tokens of its prompt."""
        return len(self.prompt) + (0 if self.trace is None else self.trace.length)


def store_rows(
    system: MultiAgentSystem,
    prompt_ids: Sequence[Tensor],
    prompt_lengths: Sequence[Lengths],
    decoding: Decoding,
    store: TraceStore,
    model: str,
    adapter: Adapter | None,
    *,
    seeds: Sequence[int] | None = None,
    control: Control | None = None,
) -> Iterator[Row]:
    """Run the senders of all rows, at most `decoding.max_rows` at once, and keep what they hand to the last agent.

    Args:
        prompt_ids, prompt_lengths, seeds, control: as :meth:`MultiAgentSystem.generate` takes them.
        model: fingerprint of the base model.
        adapter: what the last agent runs with.

    Raises:
        ValueError: prompts or seeds that do not fit, or traces that the store has no room for.
        UnsupportedModelError: recurrent layers, whose states no engine here continues.
    """
    trajectory = system.trajectory
    seeds = checked_seeds(trajectory, prompt_ids, prompt_lengths, decoding, seeds, control)
    last, device = trajectory.model_of(trajectory.topology.last), trajectory.model.device
    rows = [ids.to(device).split(list(n)) for ids, n in zip(prompt_ids, prompt_lengths, strict=True)]
    for indices in batches(len(seeds), decoding.max_rows):
        started = time.perf_counter()
        ids = [torch.cat([agent[i] for i in indices]) for agent in rows]
        lengths = [[len(agent[i]) for i in indices] for agent in rows]
        with torch.no_grad(), evaluating(nn.ModuleList(trajectory.models.values())):
            trace = received(trajectory, ids, lengths, [seeds[i] for i in indices], control)
            stored = [None if n == 0 else store.put(trace, row, model) for row, n in enumerate(trace.host_lengths)]
            seconds = time.perf_counter() - started
            probe = None
            if indices[0] == 0:
                n = lengths[-1][0]
                hidden = last.read(trace.select_rows([0]), [n], input_ids=rows[-1][0], outputs=[(n - 1, n)])
                probe = _likeliest(hidden, last)
        for row, i in enumerate(indices):
            prompt = tuple(rows[-1][i].tolist())
            yield Row(prompt, seeds[i], stored[row], adapter, seconds, len(indices), probe if i == 0 else None)


def _likeliest(hidden: Tensor, last: AgentModel | WithAdapter) -> dict[int, float]:
    logprobs = last.head(hidden)[0].float().log_softmax(-1)
    found = logprobs.topk(min(_PROBED, logprobs.numel()))
    return dict(zip(found.indices.tolist(), found.values.tolist(), strict=True))
