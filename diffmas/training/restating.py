"""Agents before the last learn to say again what they are told, before they learn what of it is needed.

A sender's latent steps are inputs that the model knows where it says something. Teaching it to say what it was told, in
text and with a loss on every token, is cheap, and what the receiver is asked for is then in the trace from the first
step of the method's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from diffmas.agents.collator import Collator, pack
from diffmas.agents.scoring import restating_agents
from diffmas.agents.topology import Topology

#: Of a batch, what the restating loss is taken on; all else is the method's.
SAID = ("said_ids", "said_lengths")


def check_restating(topology: Topology, restate_steps: int, steps: int | None = None) -> None:
    """Raise `ValueError` where no agent can learn to restate, or nothing else would be learnt in `steps`, if known."""
    if restate_steps and not restating_agents(topology):
        raise ValueError(
            f"restate_steps is {restate_steps}, and topology {topology.name!r} has no agent before the last whose "
            "adapter trains; allowed: 0"
        )
    if restate_steps and steps is not None and restate_steps >= steps:
        raise ValueError(f"restate_steps is {restate_steps}, and the training has {steps} steps; allowed: fewer")


class RestatingCollator:
    """Adds to the batches of `collate` what every restating agent is taught to say; `texts` has the prompts."""

    def __init__(self, collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]], texts: Collator):
        self._collate, self._texts = collate, texts
        self._agents = restating_agents(texts.topology)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self._collate(items)
        packed = [pack(self._texts.encode_restated(agent, items)) for agent in self._agents]
        return batch | dict(zip(SAID, ([ids for ids, _ in packed], [lengths for _, lengths in packed]), strict=True))


class LogAtItsEnd(TrainerCallback):
    """Logs at the last restating step, so that no entry is the mean of two kinds of loss."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step == args.restate_steps
