"""Multi-agent systems of language models that communicate through key/value traces and are trained through them."""

import diffmas_ops  # noqa: F401  (before anything else that imports torch; see diffmas_ops.threads)

# isort: split
from diffmas.system import MultiAgentSystem, TrajectoryOutput
from diffmas.topology import Agent, Topology, TopologyError, load_topology

__all__ = ["Agent", "MultiAgentSystem", "Topology", "TopologyError", "TrajectoryOutput", "load_topology"]
