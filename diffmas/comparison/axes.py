"""What an ablation can sweep, and each value as a method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffmas.agents.topology import Agent, Topology
from diffmas.command_line import integers
from diffmas.evaluation.methods.base import ALL_CONTROLS, Method
from diffmas.models.alignment import ALIGNMENTS

#: What can be swept, and what a value is read as.
AXES = {
    "latent_steps": int, "agents": int, "lora_r": int, "detach_trace": bool, "handover": str, "handover_sink": str,
    "adapters": str, "alignment": str,
}  # fmt: skip


def values_of(axis: str, text: str) -> list[Any]:
    """The values of an axis in a list with commas.

    Raises:
        ValueError: one that the axis cannot take, or that is there twice.
    """
    parts, kind = [p.strip() for p in text.split(",")], AXES[axis]
    if len(set(parts)) < len(parts):
        raise ValueError(f"{axis} is {text!r}; allowed: different values")
    if kind is int:
        return integers(axis, text)
    if kind is bool:
        if not {p.lower() for p in parts} <= {"true", "false"}:
            raise ValueError(f"{axis} is {text!r}; allowed: true, false, or both")
        return [p.lower() == "true" for p in parts]
    if axis == "alignment" and (unknown := [p for p in parts if p not in ALIGNMENTS]):
        raise ValueError(f"alignment has {unknown}; allowed: {', '.join(ALIGNMENTS)}")
    return parts


def point(axis: str, value: Any, agents: int, topology: Topology) -> Method:
    """One value of a sweep as a method: the trained trace, with that one thing set differently.

    Raises:
        ValueError: a number of agents the topology does not have.
    """
    agents = value if axis == "agents" else agents
    shape = first_agents(topology, agents)
    if axis == "handover":
        shape = replace(shape, handover=value)
    elif axis == "handover_sink":
        shape = replace(shape, handover_sink=int(value) if value.isdecimal() else value)
    elif axis == "adapters":
        shape = replace(shape, adapters=value)
    settings = {} if axis == "agents" else {axis: value}
    controls = ALL_CONTROLS if agents > 1 else ("matched",)
    return Method(f"{axis}={value}", f"{axis} {value}", True, settings, lambda _: shape, controls=controls)


def first_agents(topology: Topology, count: int) -> Topology:
    """The first `count - 1` agents and the last; who received from an agent left out receives from its senders.

    Raises:
        ValueError: a number the topology does not have.
    """
    if not 1 <= count <= len(topology.agents):
        raise ValueError(f"agents is {count}; allowed: 1 to {len(topology.agents)}, the agents of {topology.name}")
    kept = [*topology.agents[: count - 1], topology.last]
    names = {agent.name for agent in kept}
    all_agents = {agent.name: agent for agent in topology.agents}

    def reach(agent: Agent) -> dict[str, bool]:
        """Kept agents that it receives from in the end, and whether over a bridge on the way."""
        found: dict[str, bool] = {}
        for sender in agent.senders:
            over = sender in topology.bridged(agent)
            behind = {sender: False} if sender in names else reach(all_agents[sender])
            found |= {name: over or crossed or found.get(name, False) for name, crossed in behind.items()}
        return found

    agents = []
    for agent in kept:
        found = reach(agent)
        agents.append(replace(agent, senders=tuple(found), bridges=tuple(n for n, over in found.items() if over)))
    return topology.with_agents(agents)
