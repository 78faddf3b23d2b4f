"""Agents talk in text: what an agent writes goes into the prompts of all agents behind it.

Every agent before the last is the untrained base model. `text+sft` trains the last agent alone, on gold answers behind
the texts the others wrote for the very item: text has no gradient that could reach the writers, and gold answers say
nothing about what they ought to have written.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffmas.data import pack
from diffmas.methods.base import Method, Reading, TraceChannel
from diffmas.topology import Agent, Topology


def last_alone(topology: Topology) -> Topology:
    """The last agent, under its own role."""
    return Topology("text", (Agent(topology.last.name, role=topology.last.role),))


class TextChannel(TraceChannel):
    """Earlier agents write, one after the other, with the base model; their texts are in the last one's prompt.

    Args:
        system: of the last agent alone; its model, without the adapter, writes for the others.
        topology: of all agents. An agent reads the texts of all its ancestors, like a trace handed over in full.
        decoding: of the texts, one sample each.
    """

    def __init__(self, system, task, tokenizer, topology, decoding):
        super().__init__(system, task, tokenizer)
        for agent in topology.agents:
            task.prompts.fields(agent.role)
        self.team, self.decoding = topology, replace(decoding, samples=1)

    def encode_prompts(self, items) -> dict[str, Any]:
        """Prompts for training: a text depends on the item alone, whatever batch or epoch it is drawn for."""
        reading = self.read(items, [zlib.crc32(repr(sorted(item.items())).encode()) for item in items])
        return {"prompt_ids": reading.prompt_ids, "prompt_lengths": reading.prompt_lengths}

    def read(self, items, seeds: Sequence[int]) -> Reading:
        *writers, last = self.team.agents
        texts: dict[str, list[str]] = {}
        spent, prefill = [0] * len(items), [0] * len(items)
        for agent in writers:
            ids, lengths = self._prompts(agent, items, texts)
            answers = self._write(ids, lengths, seeds)
            texts[agent.name] = [answer.text for answer in answers]
            spent = [n + len(answer.logprobs) for n, answer in zip(spent, answers, strict=True)]
            prefill = [a + b for a, b in zip(prefill, lengths, strict=True)]
        ids, lengths = self._prompts(last, items, texts)
        return Reading([ids], [lengths], [a + b for a, b in zip(prefill, lengths, strict=True)], spent, 0)

    def _prompts(self, agent: Agent, items, texts: dict[str, list[str]]):
        written = [[(n, texts[n][i]) for n in self.team.ancestors(agent.name)] for i in range(len(items))]
        return pack(self.prompts.encode(agent.role, items, self.tokenizer, written))

    def _write(self, ids, lengths, seeds):
        training = self.system.training
        self.system.eval()
        try:
            with torch.no_grad(), self.system.model.disable_adapter():
                rows = self.system.generate([ids], [lengths], self.tokenizer, self.decoding, seeds=seeds)
        finally:
            self.system.train(training)
        return [samples[0] for samples in rows]


TEXT = Method("text", "agents talk in text", topology=last_alone, channel=TextChannel)
TEXT_SFT = Method(
    "text+sft", "agents talk in text, last one fine-tuned", trained=True, topology=last_alone, channel=TextChannel
)
