"""Prompts of at most so many tokens: what fills them is cut, what the role says stays whole."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from diffmas.prompts import Prompts
from diffmas.support.distributed import gathered


@dataclass(frozen=True)
class ShortenedPrompts(Prompts):
    """Prompts whose `encode` gives no more than `max_tokens` tokens an agent.

    The longest of the texts that a prompt is filled with (the item's fields, and what earlier agents wrote) is cut at
    its end, as little as will do; where that is not enough, the next longest. Answers, and what checks them, keep the
    item as it is. `cuts`: tokens lost, by role and by the item.
    """

    max_tokens: int = 0
    cuts: dict[tuple[str, str], int] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, prompts: Prompts, max_tokens: int) -> ShortenedPrompts:
        return cls(**{f.name: getattr(prompts, f.name) for f in fields(prompts)}, max_tokens=max_tokens)

    def encode(
        self,
        role: str,
        items: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        written: Sequence[Sequence[tuple[str, str]]] | None = None,
    ) -> list[list[int]]:
        """As :meth:`Prompts.encode`, cut.

        Raises:
            ValueError: the role prompt alone is longer.
        """
        rows = super().encode(role, items, tokenizer, written)
        for i, ids in enumerate(rows):
            if len(ids) > self.max_tokens:
                item, texts = items[i], () if written is None else written[i]
                rows[i] = self._cut(role, item, tokenizer, texts)
                self.cuts[role, _name(item)] = len(ids) - len(rows[i])
        return rows

    def _cut(self, role, item, tokenizer, written) -> list[int]:
        names = [name for name in self.fields(role) if isinstance(item.get(name), str)]
        texts = [*(item[name] for name in names), *(text for _, text in written)]

        def encoded() -> list[int]:
            filled = dict(zip(names, texts, strict=False))
            wrote = [(name, text) for (name, _), text in zip(written, texts[len(names) :], strict=True)]
            return super(ShortenedPrompts, self).encode(role, [{**item, **filled}], tokenizer, [wrote])[0]

        while any(texts):
            longest = max(range(len(texts)), key=lambda i: len(texts[i]))
            whole, low, high = texts[longest], 0, len(texts[longest])
            while high - low > 1:
                texts[longest] = whole[: (middle := (low + high) // 2)]
                low, high = (middle, high) if len(encoded()) <= self.max_tokens else (low, middle)
            texts[longest] = whole[:low]
            if len(ids := encoded()) <= self.max_tokens:
                return ids
        raise ValueError(
            f"max_prompt_tokens is {self.max_tokens}, and {self.source} takes {len(encoded())} for role {role} without "
            "any text of an item; allowed: more"
        )


def _name(item: Mapping[str, Any]) -> str:
    """The same in every process."""
    return hashlib.sha256(repr(sorted(map(str, item.items()))).encode(errors="replace")).hexdigest()


@contextlib.contextmanager
def counting(prompts: Prompts) -> Iterator[Callable[[Mapping[str, Any]], int]]:
    """Tells, of an item, how many tokens of its prompts were cut in this context, over all agents."""
    if not isinstance(prompts, ShortenedPrompts):
        yield lambda item: 0
        return
    before = dict(prompts.cuts)
    prompts.cuts.clear()
    try:
        yield lambda item: sum(tokens for (_, name), tokens in prompts.cuts.items() if name == _name(item))
    finally:
        for key, tokens in before.items():
            prompts.cuts.setdefault(key, tokens)


def cut_summary(prompts: Prompts) -> dict[str, int] | None:
    """How many items were cut for some role, and how many tokens were lost; None where nothing is ever cut.

    Of several processes, all have to call this.
    """
    if not isinstance(prompts, ShortenedPrompts):
        return None
    cuts = dict(gathered(list(prompts.cuts.items())))
    return {
        "max_prompt_tokens": prompts.max_tokens,
        "items": len({item for _, item in cuts}),
        "tokens": sum(cuts.values()),
    }


def cut_line(summary: Mapping[str, int] | None) -> str | None:
    """The same in words; None where nothing was cut."""
    if not summary or not summary["items"]:
        return None
    return (
        f"max_prompt_tokens {summary['max_prompt_tokens']}: {summary['items']} items were cut, by {summary['tokens']} "
        "tokens over all agents"
    )
