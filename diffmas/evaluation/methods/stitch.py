"""Agents work on their own, none seeing another's trace; the last one attends to all their traces put together."""

from dataclasses import replace

from diffmas.agents.topology import Topology
from diffmas.evaluation.methods.base import ALL_CONTROLS, Method


def stitched(topology: Topology) -> Topology:
    """The same agents and hand-over, with every sender before the last agent taken away."""
    *others, last = topology.agents
    agents = [replace(agent, senders=(), bridges=()) for agent in others]
    last = replace(last, senders=tuple(agent.name for agent in others), bridges=())
    return topology.with_agents((*agents, last), "stitch")


STITCH = Method("stitch", "stitched traces, no training", topology=stitched, controls=ALL_CONTROLS)
#: Like the trained trace, with exact gradients through every hand-over.
STITCH_TRAINED = Method(
    "stitch+train", "stitched traces, trained", trained=True, settings={"detach_trace": False}, topology=stitched,
    controls=ALL_CONTROLS,
)  # fmt: skip
