"""Answers that have to be written just as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffmas.answers import final, reasoning


def extract(text: str) -> str | None:
    """The final answer (see :func:`final.words`) as it is written."""
    return final.words(reasoning.removed(text))


def check(text: str, item: Mapping[str, Any]) -> bool:
    """Whether `text`, or the final answer in it, is just the item's `gold` (or `answer`) (spaces around it aside)."""
    gold = str(item.get("gold", item["answer"])).strip()
    return gold in (reasoning.removed(text).strip(), extract(text))
