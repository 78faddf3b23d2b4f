"""Reading a prompt and a text behind it, for the loss on the text's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmas.agents.positions import check_positions
from diffmas.agents.topology import Agent, Topology
from diffmas.agents.trajectory import Trajectory
from diffmas.models.adapters import WithAdapter
from diffmas.models.agent_model import AgentModel, Lengths
from diffmas_ops import KVTrace


def predicting_states(
    model: AgentModel | WithAdapter, trace: KVTrace, prompt_ids: Tensor, prompt_lengths: Lengths,
    text_ids: Tensor, text_lengths: Lengths,
) -> Tensor:  # fmt: skip
    """Hidden states `[text tokens, hidden]` that predict the tokens of every row's text behind its prompt.

    Raises:
        ValueError: rows of more columns than the model has positions.
    """
    ids = _interleave(prompt_ids, prompt_lengths, text_ids, text_lengths)
    totals = [p + a for p, a in zip(prompt_lengths, text_lengths, strict=True)]
    longest = max(before + more for before, more in zip(trace.host_lengths, totals, strict=True))
    check_positions(model.language_model, longest, "a training batch")
    predicting = [(p - 1, p - 1 + a) for p, a in zip(prompt_lengths, text_lengths, strict=True)]
    return model.read(trace, totals, input_ids=ids, outputs=predicting)


def check_texts(name: str, ids: Tensor, lengths: Lengths, rows: int) -> None:
    """Raise `ValueError` unless `ids` are packed texts of `rows` rows, none of them empty."""
    if len(lengths) != rows or min(lengths, default=0) < 1 or sum(lengths) != ids.numel():
        raise ValueError(
            f"{name} is {list(lengths)} for {ids.numel()} tokens; allowed: {rows} lengths ≥ 1 that sum to the number "
            "of tokens"
        )


def restating_agents(topology: Topology) -> list[Agent]:
    """Agents before the last whose adapter trains: those that can learn to say again what they were told."""
    return [a for a in topology.agents[:-1] if topology.adapter_of(a) in topology.trained_on(topology.model_of(a))]


def restating_loss(
    trajectory: Trajectory,
    prompt_ids: Sequence[Tensor],
    prompt_lengths: Sequence[Lengths],
    said_ids: Sequence[Tensor],
    said_lengths: Sequence[Lengths],
) -> Tensor:
    """Cross-entropy, summed over tokens, of what each of :func:`restating_agents` says behind its own prompt.

    Nothing is handed over: every agent is alone.

    Args:
        prompt_ids, prompt_lengths: of all agents, as for a trajectory.
        said_ids: per restating agent, int64 `[tokens]`, the rows' texts packed.
        said_lengths: per restating agent, the rows' lengths, each ≥ 1.

    Raises:
        ValueError: texts that do not fit the agents or the prompts.
    """
    topology = trajectory.topology
    agents, places = restating_agents(topology), {agent.name: i for i, agent in enumerate(topology.agents)}
    if not len(said_ids) == len(said_lengths) == len(agents):
        raise ValueError(
            f"said_ids has {len(said_ids)} and said_lengths {len(said_lengths)} entries; allowed: one for each of "
            f"{[agent.name for agent in agents]}"
        )
    losses = []
    for agent, ids, lengths in zip(agents, said_ids, said_lengths, strict=True):
        prompt, own = prompt_ids[places[agent.name]], prompt_lengths[places[agent.name]]
        check_texts(f"said_lengths of agent {agent.name}", ids, lengths, len(own))
        model = trajectory.model_of(agent)
        capacity = max(p + n for p, n in zip(own, lengths, strict=True))
        trace = KVTrace.allocate(batch=len(own), capacity=capacity, backend=model.backend, **model.trace_sizes)
        states = predicting_states(model, trace, prompt, own, ids, lengths)
        losses.append(model.answer_loss(model.head, states, ids))
    return torch.stack([loss.to(losses[0]) for loss in losses]).sum()


def _interleave(first: Tensor, first_lengths: Lengths, second: Tensor, second_lengths: Lengths) -> Tensor:
    """Row by row, the first packed batch's tokens and then the second's."""
    pairs = zip(first.split(list(first_lengths)), second.split(list(second_lengths)), strict=True)
    return torch.cat([part for pair in pairs for part in pair])
