"""Rows whose senders have run: what an engine elsewhere needs to decode the last agent's answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffmas.agents.controls import Control
from diffmas.agents.latent_rollouts import take_steps
from diffmas.agents.trajectory import Trajectory
from diffmas.generation.decoding import Decoding
from diffmas.generation.received import batches, checked_seeds, received
from diffmas.models.agent_model import AgentModel, Lengths, evaluating
from diffmas.models.embedding import input_vectors
from diffmas.serving.traces import StoredTrace, TraceStore
from diffmas.serving.weights import Adapter
from diffmas.system import MultiAgentSystem
from diffmas_ops import KVTrace

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
        embeddings: `[columns, hidden]`, in place of a trace and of the prompt's tokens: all that a model has to read.
    """

    prompt: tuple[int, ...]
    seed: int
    trace: StoredTrace | None = None
    adapter: Adapter | None = None
    seconds: float = 0.0
    beside: int = 1
    probe: dict[int, float] | None = None
    embeddings: Tensor | None = None

    @property
    def length(self) -> int:
        """Columns of its trace and tokens of its prompt."""
        if self.embeddings is not None:
            return len(self.embeddings)
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
    for block in _blocks(trajectory, prompt_ids, prompt_lengths, seeds, decoding.max_rows):
        with _running(trajectory):
            trace = received(trajectory, block.ids, block.lengths, block.seeds, control)
            stored = [None if n == 0 else store.put(trace, row, model) for row, n in enumerate(trace.host_lengths)]
            found = block.rows(trajectory, trace, [{"adapter": adapter, "trace": own} for own in stored])
        yield from found


def embedded_rows(
    system: MultiAgentSystem,
    prompt_ids: Sequence[Tensor],
    prompt_lengths: Sequence[Lengths],
    decoding: Decoding,
    adapter: Adapter | None,
    *,
    seeds: Sequence[int] | None = None,
) -> Iterator[Row]:
    """Run the senders of all rows, and keep what all agents read and thought as the last one's own input embeddings.

    Arguments are those of :func:`store_rows`.

    Raises:
        ValueError: prompts or seeds that do not fit; agents whose traces the last agent's model would not write itself.
    """
    check_embeddable(system)
    trajectory = system.trajectory
    seeds = checked_seeds(trajectory, prompt_ids, prompt_lengths, decoding, seeds, None)
    vectors, _ = input_vectors(system.agent_model.language_model)
    for block in _blocks(trajectory, prompt_ids, prompt_lengths, seeds, decoding.max_rows):
        thought: list[Tensor] = []
        recording = replace(trajectory, latent_rollout=_recording(thought), allocate=KVTrace.allocate)
        with _running(trajectory):
            trace = received(recording, block.ids, block.lengths, block.seeds)
            parts = [vectors[ids].split(list(n)) for ids, n in zip(block.ids, block.lengths, strict=True)]
            for place, inputs in reversed([*enumerate(thought)]):
                parts.insert(place + 1, inputs.unbind())
            embeddings = [torch.cat(own).cpu() for own in zip(*parts, strict=True)]
            found = block.rows(trajectory, trace, [{"adapter": adapter, "embeddings": own} for own in embeddings])
        yield from found


def check_embeddable(system: MultiAgentSystem) -> None:
    """Raise `ValueError` where what the last agent attends to is not what its model writes of its inputs."""
    topology = system.topology
    allowed = "allowed with prompt embeddings: a chain with handover 'full', of one model and one adapter"
    for agent, before in zip(topology.agents[1:], topology.agents, strict=False):
        if topology.bridged(agent) or topology.continues(agent) != before.name:
            raise ValueError(
                f"topology is {topology.name!r} with handover {topology.handover!r}, where agent {agent.name} does not "
                f"go on with all that agent {before.name} has written; {allowed}"
            )
        for what, of in (("model", topology.model_of), ("adapter", topology.adapter_of)):
            if (own := of(agent)) != (other := of(before)):
                raise ValueError(
                    f"{what} is {own!r} for agent {agent.name} and {other!r} for agent {before.name}; {allowed}"
                )


def _recording(thought: list[Tensor]):
    """A latent rollout that adds its inputs `[batch, m, hidden]` to `thought`."""

    def rollout(model: AgentModel, steps: int, trace: KVTrace, hidden: Tensor) -> Sequence[Tensor]:
        inputs, states = take_steps(model, steps, trace, hidden)
        thought.append(torch.stack(inputs, 1))
        return states

    return rollout


@dataclass
class _Block:
    """Rows whose senders run together: by agent, packed prompts and their lengths; seeds by row."""

    indices: Sequence[int]
    ids: list[Tensor]
    lengths: list[list[int]]
    seeds: list[int]
    started: float

    def rows(self, trajectory: Trajectory, trace: KVTrace, parts: Sequence[dict[str, Any]]) -> list[Row]:
        """Those whose last agent reads behind `trace`, with what else each one is made of; only the first is probed."""
        seconds = time.perf_counter() - self.started
        prompts = [tuple(ids.tolist()) for ids in self.ids[-1].split(self.lengths[-1])]
        probe = self._probe(trajectory, trace) if self.indices[0] == 0 else None
        first, *others = (
            Row(prompt, seed, seconds=seconds, beside=len(parts), **part)
            for prompt, seed, part in zip(prompts, self.seeds, parts, strict=True)
        )
        return [replace(first, probe=probe), *others]

    def _probe(self, trajectory: Trajectory, trace: KVTrace) -> dict[int, float]:
        last, n = trajectory.model_of(trajectory.topology.last), self.lengths[-1][0]
        ids = self.ids[-1][:n]
        hidden = last.read(trace.select_rows([0]), [n], input_ids=ids, outputs=[(n - 1, n)])
        logprobs = last.head(hidden)[0].float().log_softmax(-1)
        found = logprobs.topk(min(_PROBED, logprobs.numel()))
        return dict(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def _blocks(
    trajectory: Trajectory,
    prompt_ids: Sequence[Tensor],
    prompt_lengths: Sequence[Lengths],
    seeds: Sequence[int],
    most: int,
) -> Iterator[_Block]:
    device = trajectory.model.device
    rows = [ids.to(device).split(list(n)) for ids, n in zip(prompt_ids, prompt_lengths, strict=True)]
    for indices in batches(len(seeds), most):
        started = time.perf_counter()
        ids = [torch.cat([agent[i] for i in indices]) for agent in rows]
        lengths = [[len(agent[i]) for i in indices] for agent in rows]
        yield _Block(indices, ids, lengths, [seeds[i] for i in indices], started)


@contextlib.contextmanager
def _running(trajectory: Trajectory) -> Iterator[None]:
    with torch.no_grad(), evaluating(nn.ModuleList(trajectory.models.values())):
        yield
