"""Agents talk in text: what an agent writes goes into the prompts of all agents behind it.

Every agent before the last is the untrained base model. `text+sft` trains the last agent alone, on gold answers behind
the texts the others wrote for the very item: text has no gradient that could reach the writers, and gold answers say
nothing about what they ought to have written.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from diffmas.agents.collator import pack
from diffmas.agents.topology import Agent, Topology, alone
from diffmas.evaluation.methods.base import Method, Reading, TraceChannel
from diffmas.evaluation.methods.text_cache import TextCache, base_fingerprint, fingerprint
from diffmas.models.adapters import without_adapters
from diffmas.prompts.dates import template_options
from diffmas.support.failures import filling_template
from diffmas.support.progress import announced

TEXTS_FILE = "texts.sqlite"


def last_alone(topology: Topology) -> Topology:
    """The last agent, under its own role."""
    return Topology("text", (replace(topology.last, senders=(), bridges=()),), models=alone(topology).models)


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
        self._kept: TextCache | None = None
        self._decided_by = ""

    def kept_in(self, folder: Path) -> TextChannel:
        """Keep texts for training in `folder`, by all that decides them; other runs on the same items share them."""
        self._kept = TextCache(folder / TEXTS_FILE)
        tokenizer = [self.tokenizer.chat_template, sorted(self.tokenizer.get_vocab().items())]
        dated = [*template_options(self.tokenizer, self.prompts.date).values()]
        own = [getattr(self.prompts, name, None) for name in ("max_tokens", "system", "chat_template_kwargs")]
        decided_by = [self.team.to_dict(), self.prompts.roles, *own, asdict(self.decoding), tokenizer, *dated]
        with announced("taking the base model's fingerprint"):
            self._decided_by = fingerprint([base_fingerprint(self.system.agent_model.model), decided_by])
        return self

    def encode_prompts(self, items) -> dict[str, Any]:
        """Prompts for training: a text depends on the item alone, whatever batch or epoch it is drawn for."""
        ids, lengths = self._prompts(self.team.last, items, self._training_texts(items))
        return {"prompt_ids": [ids], "prompt_lengths": [lengths]}

    def read(self, items, seeds: Sequence[int]) -> Reading:
        texts, spent, prefill = self._write(items, seeds)
        ids, lengths = self._prompts(self.team.last, items, texts)
        return Reading([ids], [lengths], [a + b for a, b in zip(prefill, lengths, strict=True)], spent, 0)

    def _training_texts(self, items) -> dict[str, list[str]]:
        """Texts by agent, a text an item."""
        keys = [fingerprint([self._decided_by, dict(item)]) for item in items]
        found = self._kept.find(keys) if self._kept else {}
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in found}
        if missing:
            seeds = [zlib.crc32(repr(sorted(item.items())).encode()) for item in missing.values()]
            texts, _, _ = self._write(list(missing.values()), seeds)
            written = {key: {name: texts[name][i] for name in texts} for i, key in enumerate(missing)}
            if self._kept:
                self._kept.add(written)
            found |= written
        return {agent.name: [found[key][agent.name] for key in keys] for agent in self.team.agents[:-1]}

    def _write(self, items, seeds: Sequence[int]) -> tuple[dict[str, list[str]], list[int], list[int]]:
        """Texts by agent, a text an item; tokens generated and tokens read for them, by item."""
        texts: dict[str, list[str]] = {}
        spent, prefill = [0] * len(items), [0] * len(items)
        for agent in self.team.agents[:-1]:
            ids, lengths = self._prompts(agent, items, texts)
            answers = self._generate(ids, lengths, seeds)
            texts[agent.name] = [answer.text for answer in answers]
            spent = [n + len(answer.logprobs) for n, answer in zip(spent, answers, strict=True)]
            prefill = [a + b for a, b in zip(prefill, lengths, strict=True)]
        return texts, spent, prefill

    def _prompts(self, agent: Agent, items, texts: dict[str, list[str]]):
        written = [[(n, texts[n][i]) for n in self.team.ancestors(agent.name)] for i in range(len(items))]
        with filling_template(agent.role):
            prompts = self.prompts.with_options(agent.chat_template_kwargs)
            return pack(prompts.encode(agent.role, items, self.tokenizer, written))

    def _generate(self, ids, lengths, seeds):
        training = self.system.training
        self.system.eval()
        try:
            with torch.no_grad(), without_adapters(self.system.agent_model.model):
                rows = self.system.generate([ids], [lengths], self.tokenizer, self.decoding, seeds=seeds)
        finally:
            self.system.train(training)
        return [samples[0] for samples in rows]


TEXT = Method("text", "agents talk in text", topology=last_alone, channel=TextChannel)
TEXT_SFT = Method(
    "text+sft", "agents talk in text, last one fine-tuned", trained=True, topology=last_alone, channel=TextChannel
)
