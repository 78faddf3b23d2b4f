"""Answers in words: names, dates, times, yes and no. Plain numbers among them are compared as mathematics does."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from diffmas.answers import final, mathematics, numbers, reasoning

_SAME = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'} | dict.fromkeys("‐‑‒–−", "-"))
_NUMBER = re.compile(r"[-+−\s$€£]*[0-9.][0-9.,\s/]*(?:[eE][-+]?[0-9]+)?[\s%]*")


def extract(text: str) -> str | None:
    """The final answer (see :func:`final.words`), folded (see :func:`fold`)."""
    found = final.words(reasoning.removed(text))
    return None if found is None else fold(found)


def check(text: str, item: Mapping[str, Any]) -> bool:
    """Whether `text`, or the final answer in it, is the item's `gold` (or `answer`) when both are folded."""
    gold, text = str(item.get("gold", item["answer"])), reasoning.removed(text)
    if is_number(gold):
        return mathematics.check(text, item)
    # What asks is no answer, unless the right one is a question, which has to be all that is said.
    asked = final.written(text) if gold.rstrip().endswith("?") else []
    return any(found is not None and fold(found) == fold(gold) for found in (text, final.words(text), *asked))


def is_number(gold: str) -> bool:
    """Whether a right answer is a number without any word, to be compared by value."""
    return _NUMBER.fullmatch(gold) is not None and numbers.parse(gold) is not None


def fold(text: str) -> str:
    """NFKC, lower case, one kind of dash and quote, no article, no punctuation around it, no space next to brackets."""
    text = unicodedata.normalize("NFKC", final.unwrapped(text)).translate(_SAME).casefold()
    text = re.sub(r"\s+", " ", re.sub(r"\s*([,()\[\]{}])\s*", r"\1", text).replace(",", ", "))
    bare = text.strip(" .,;:!?\"'`。、")
    return re.sub(r"^(?:an?|the) (?=\S)", "", bare) or text.strip()
