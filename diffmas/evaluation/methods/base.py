"""A method as settings over a run's own, and the channel its last agent gets the others' work through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diffmas.agents.collator import Collator
from diffmas.agents.controls import CONTROLS
from diffmas.agents.topology import Topology
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Item, Task


@dataclass(frozen=True)
class Reading:
    """What the system reads to answer some rows, and what has been spent on every row before its first answer token.

    Attributes:
        prompt_ids, prompt_lengths: as :meth:`MultiAgentSystem.forward` takes them.
        prefill_tokens: prompt tokens of all agents, by row. `message_tokens`: tokens earlier agents wrote, by row.
        latent_steps: of all agents, the same for every row.
    """

    prompt_ids: list[Tensor]
    prompt_lengths: list[list[int]]
    prefill_tokens: list[int]
    message_tokens: list[int]
    latent_steps: int


class TraceChannel(Collator):
    """Earlier agents' work is in the trace: the system reads every agent's prompt, and nothing else is to be done."""

    def __init__(self, system: MultiAgentSystem, task: Task, tokenizer: PreTrainedTokenizerBase):
        super().__init__(system.topology, task.prompts, tokenizer, system.other_tokenizers)
        self.system = system

    def kept_in(self, folder: Path) -> TraceChannel:
        """Keep in `folder` what is costly to find out about training items; here nothing is. Returns itself."""
        return self

    def read(self, items: Sequence[Item], seeds: Sequence[int]) -> Reading:
        encoded = self.encode_prompts(items)
        lengths = encoded["prompt_lengths"]
        prefill = [sum(row) for row in zip(*lengths, strict=True)]
        steps = self.system.latent_steps * (len(lengths) - 1)
        return Reading(encoded["prompt_ids"], lengths, prefill, [0] * len(items), steps)


#: Makes the channel of a system; `Topology` is the run's, `Decoding` that of the texts agents write.
MakeChannel = Callable[[MultiAgentSystem, Task, PreTrainedTokenizerBase, Topology, Decoding], TraceChannel]


def trace_channel(
    system: MultiAgentSystem, task: Task, tokenizer: PreTrainedTokenizerBase, topology: Topology, decoding: Decoding
) -> TraceChannel:
    return TraceChannel(system, task, tokenizer)


@dataclass(frozen=True)
class Method:
    """How an item is answered.

    Args:
        name: on the command line and in records. `label`: in tables.
        trained: it has an adapter of its own; otherwise the base model answers.
        settings: what it sets differently from the run's :class:`~diffmas.runs.settings.SystemArguments`.
        topology: its topology, from the run's.
        channel: makes what turns items into prompts, for training and answering alike.
        controls: trace controls that say something about it.
        thinking: whether the chat template is told to think; None: it is told nothing.
    """

    name: str
    label: str
    trained: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    topology: Callable[[Topology], Topology] = lambda topology: topology
    channel: MakeChannel = trace_channel
    controls: tuple[str, ...] = ("matched",)
    thinking: bool | None = None


#: Controls of a method whose last agent attends to a trace.
ALL_CONTROLS = tuple(CONTROLS)
