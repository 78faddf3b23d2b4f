"""From items to packed token batches: no padding, lengths beside the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from diffmas.agents.thinking import closing, own_options
from diffmas.agents.topology import Agent, Topology
from diffmas.prompts import Prompts
from diffmas.prompts.chat_template import end_of_turn
from diffmas.prompts.control_tokens import encode_texts
from diffmas.support.failures import filling_template


class Collator:
    """Packs items into the arguments of :meth:`MultiAgentSystem.forward`.

    Token tensors are int64 `[tokens]`, one per agent for prompts; lengths are Python integers, so that planning a
    batch never waits for a device. An answer ends with the token that ends a turn in the chat template, or else with
    the tokenizer's end-of-sequence token; one that it spells is text. Where the last agent's prompt ends in a reasoning
    block, an answer is the item's `reasoning` (nothing where it has none), the tag that closes the block, and `answer`.

    Args:
        tokenizer: of the last agent, and of all that run on its model. `others`: of the other models, by name.

    Raises:
        ValueError: an agent's role without a prompt, or a tokenizer without an end-of-sequence token; a model without
            a tokenizer.
    """

    def __init__(
        self,
        topology: Topology,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        others: Mapping[str, PreTrainedTokenizerBase] | None = None,
    ):
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer has no end-of-sequence token; allowed: one with eos_token set")
        for agent in topology.agents:
            prompts.fields(agent.role)
        self.topology, self.prompts, self.tokenizer = topology, prompts, tokenizer
        self._others = others or {}
        if missing := [name for name in topology.model_names[1:] if self._others.get(name) is None]:
            raise ValueError(
                f"no tokenizer is given for models {missing}; allowed: one for each model, which text needs"
            )

    def tokenizer_of(self, agent: Agent) -> PreTrainedTokenizerBase:
        """That of the agent's model."""
        return self._others.get(self.topology.model_of(agent), self.tokenizer)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.encode_prompts(items)
        batch["answer_ids"], batch["answer_lengths"] = pack(self.encode_answers(items))
        return batch

    def encode_answers(self, items: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """What the last agent is taught to write, the token that ends it included."""
        with filling_template(self.topology.last.role):
            between = closing(own_options(self.prompts, self.topology), self.tokenizer)
        texts = [[str(item.get("reasoning") or ""), item["answer"]] if between else [item["answer"]] for item in items]
        return self._ended(self.topology.last, texts, between)

    def encode_restated(self, agent: Agent, items: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """What `agent` would write that says again what it is told: the fields of its prompt, a line each."""
        told = self.prompts.fields(agent.role)
        return self._ended(agent, [["\n".join(str(item[name]) for name in told)] for item in items])

    def _ended(self, agent: Agent, texts: Sequence[Sequence[str]], between: str = "") -> list[list[int]]:
        """Tokens of what the agent writes, the one that ends its turn included."""
        tokenizer = self.tokenizer_of(agent)
        with filling_template(agent.role):
            end = end_of_turn(tokenizer)
        return [ids if end is None else [*ids, end] for ids in encode_texts(tokenizer, texts, between)]

    def encode_prompts(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`prompt_ids` and `prompt_lengths` alone, for generation."""
        packed = []
        for agent in self.topology.agents:
            with filling_template(agent.role):
                prompts = self.prompts.with_options(agent.chat_template_kwargs)
                packed.append(pack(prompts.encode(agent.role, items, self.tokenizer_of(agent))))
        return {"prompt_ids": [ids for ids, _ in packed], "prompt_lengths": [lengths for _, lengths in packed]}


def pack(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, list[int]]:
    """Rows of token ids as one int64 `[total]` tensor, and their lengths."""
    return torch.tensor([token for row in rows for token in row], dtype=torch.long), [len(row) for row in rows]
