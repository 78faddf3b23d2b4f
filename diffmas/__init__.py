"""Multi-agent systems of language models that communicate through key/value traces and are trained through them."""

from diffmas.support.interrupts import leave_on_interrupt

# Before the imports that take seconds.
leave_on_interrupt()

import diffmas_ops  # noqa: E402, F401  (before anything else that imports torch; see diffmas_ops.threads)

# isort: split
from diffmas.agents.topology import Agent, Topology, TopologyError, load_topology  # noqa: E402
from diffmas.system import MultiAgentSystem, TrajectoryOutput  # noqa: E402

__all__ = ["Agent", "MultiAgentSystem", "Topology", "TopologyError", "TrajectoryOutput", "load_topology"]
