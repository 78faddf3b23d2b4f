"""Multi-agent systems of language models that communicate through key/value traces and are trained through them."""

from diffmas.support.interrupts import leave_on_interrupt

# Before the imports that take seconds.
leave_on_interrupt()

import diffmas_ops  # noqa: E402, F401  (before anything else that imports torch; see diffmas_ops.threads)

# isort: split
from diffmas.agents.collator import Collator  # noqa: E402
from diffmas.agents.topology import Agent, Topology, TopologyError, load_topology  # noqa: E402
from diffmas.generation import Completion, Decoding  # noqa: E402
from diffmas.prompts import Prompts  # noqa: E402
from diffmas.system import MultiAgentSystem, TrajectoryOutput  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Agent", "Collator", "Completion", "Decoding", "MultiAgentSystem", "Prompts", "SystemTrainer", "Topology",
    "TopologyError", "TrainArguments", "TrajectoryOutput", "load_topology",
]  # fmt: skip


def __getattr__(name: str):
    # Imports that take seconds, which asking a system does not need.
    if name == "SystemTrainer":
        from diffmas.training.trainer import SystemTrainer

        return SystemTrainer
    if name == "TrainArguments":
        from diffmas.training.settings import TrainArguments

        return TrainArguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
