"""Multi-agent systems of language models that communicate through key/value traces and are trained through them."""

from diffmas.system import MultiAgentSystem, TrajectoryOutput
from diffmas.topology import Agent, Topology, TopologyError, load_topology

__all__ = ["Agent", "MultiAgentSystem", "Topology", "TopologyError", "TrajectoryOutput", "load_topology"]
