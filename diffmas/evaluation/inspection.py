"""What each agent contributed to an answer: where the answer looked, and what the latent steps are close to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmas.agents.latent_rollouts import step_by_step
from diffmas.models.agent_model import AgentModel, Lengths, evaluating
from diffmas.models.attention_masses import AttentionMasses
from diffmas.system import MultiAgentSystem
from diffmas_ops import KVTrace


@dataclass(frozen=True)
class Part:
    """Consecutive columns of the trace that one agent wrote, or what heads have beside all columns.

    Attributes:
        agent: empty for the sinks of a model.
        kind: "prompt" (with what was read over bridges before it), "latent steps", "answer", "hidden states": what the
            last agent read over a bridge; or "sink": columns handed over for attention to rest on, or, of no
            agent and no column, the attention sinks of a model that has some.
        mass: attention probability on them, averaged over layers, heads and the answer's tokens; all parts sum to 1.
        layers: the same of each attention layer.
    """

    agent: str
    kind: str
    columns: int
    mass: float
    layers: tuple[float, ...]


@dataclass(frozen=True)
class LatentStep:
    """One latent step of an agent, as tokens: `(token id, probability or cosine)`, best first.

    Attributes:
        step: 1 … m.
        said: most probable tokens under the language-model head at the hidden state the step was made of: what the
            agent would have said in its place.
        nearest: input embeddings closest to the step's own.
    """

    agent: str
    step: int
    said: tuple[tuple[int, float], ...]
    nearest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Inspection:
    """Parts in the order of the trace, a sink behind them; latent steps in the order of thinking."""

    parts: list[Part]
    steps: list[LatentStep]


@torch.no_grad()
def inspect(
    system: MultiAgentSystem,
    prompt_ids: Sequence[Tensor],
    prompt_lengths: Sequence[Lengths],
    tokens: Sequence[int],
    *,
    top: int = 3,
) -> Inspection:
    """Run one row's agents once more and look at what the answer `tokens` was made from.

    Args:
        prompt_ids, prompt_lengths: of one row, as in :meth:`MultiAgentSystem.forward`.
        tokens: the last agent's answer; attention is that of the queries that chose them.
        top: tokens per latent step.

    Raises:
        ValueError: more than one row.
    """
    if len(prompt_lengths[-1]) != 1:
        raise ValueError(f"prompt_lengths has {len(prompt_lengths[-1])} rows; allowed: 1")
    model = system.agent_model
    ids = [agent.to(model.device) for agent in prompt_ids]
    thought: list[tuple[AgentModel, Tensor]] = []

    def watched(model: AgentModel, steps: int, trace: KVTrace, hidden: Tensor) -> Sequence[Tensor]:
        states = step_by_step(model, steps, trace, hidden)
        # The last state is no step's input.
        thought.append((model, torch.cat([hidden, *states[:-1]])))
        return states

    # Whatever else takes latent steps may keep its states to itself.
    trajectory = replace(system.trajectory, latent_rollout=watched, allocate=KVTrace.allocate)
    with evaluating(system):
        received = trajectory.communicate(ids, prompt_lengths)
    writers = [agent.name for agent in system.topology.agents[:-1]]
    # Without latent steps, nobody thought.
    steps = [step for name, of in zip(writers, thought, strict=bool(thought)) for step in _latent_steps(name, *of, top)]

    answer = torch.tensor(tokens[:-1], dtype=torch.long, device=model.device)
    own_ids = torch.cat((ids[-1], answer))
    senders, at = system.topology.attended(system.topology.last.name), system.topology.sink_of(system.topology.last)
    parts = [(senders[0], "sink", 0, at)] if at and senders else []
    for name in senders:
        _, (prompt_end,), (end,) = received.segments[name]
        parts += [(name, "prompt", at, prompt_end), (name, "latent steps", prompt_end, end)]
        at = end
    lengths = dict(zip((agent.name for agent in system.topology.agents), prompt_lengths, strict=True))
    for name in system.topology.bridged(system.topology.last):
        (count,) = system.topology.states_of(name, lengths, system.latent_steps)
        parts.append((name, "hidden states", at, at + count))
        at += count
    own = system.topology.last.name, at + prompt_lengths[-1][0]
    parts += [(own[0], "prompt", at, own[1]), (own[0], "answer", own[1], at + len(own_ids))]
    call = received.trace.open([len(own_ids)])
    observed = AttentionMasses(call, len(answer) + 1)
    call.attend = observed
    with evaluating(model):
        trajectory.model_of(system.topology.last).run(call, input_ids=own_ids)
    masses, sink = observed.mean()
    found = [
        _part(name, kind, end - begin, masses[:, begin:end].sum(1)) for name, kind, begin, end in parts if end > begin
    ]
    return Inspection(found if sink is None else [*found, _part("", "sink", 0, sink)], steps)


def contributions(system: MultiAgentSystem, prompts: Sequence[Tensor], tokens: Sequence[int]) -> dict[str, Any]:
    """What :func:`inspect` finds of the row with these `prompts`, for JSON: tokens are text, in their agent's words."""
    found = inspect(system, prompts, [[len(ids)] for ids in prompts], tokens)
    tokenizers = {agent.name: system.tokenizer_of(agent) for agent in system.topology.agents}
    steps = [
        {
            "agent": step.agent,
            "step": step.step,
            "said": [[tokenizers[step.agent].decode([token]), value] for token, value in step.said],
            "nearest": [[tokenizers[step.agent].decode([token]), value] for token, value in step.nearest],
        }
        for step in found.steps
    ]
    return {"parts": [asdict(part) for part in found.parts], "steps": steps}


def _part(agent: str, kind: str, columns: int, layers: Tensor) -> Part:
    """`layers [num_layers]`: its share of every layer's attention."""
    return Part(agent, kind, columns, float(layers.mean()), tuple(layers.tolist()))


def _latent_steps(agent: str, model: AgentModel, sources: Tensor, top: int) -> Iterator[LatentStep]:
    """`sources [m, hidden]`: the hidden states that an agent's latent steps were made of."""
    weight = cast(Tensor, model.language_model.get_input_embeddings().weight)
    embedding = F.normalize(weight.float(), dim=-1)
    said = model.head(sources).float().softmax(-1).topk(top)
    nearest = (F.normalize(model.alignment(sources).float(), dim=-1) @ embedding.T).topk(top)
    for t in range(len(sources)):
        yield LatentStep(agent, t + 1, *(_pairs(found, t) for found in (said, nearest)))


def _pairs(found: torch.return_types.topk, row: int) -> tuple[tuple[int, float], ...]:
    return tuple(zip(found.indices[row].tolist(), found.values[row].tolist(), strict=True))
