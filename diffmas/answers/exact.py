"""Answers that have to be written just as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffmas.answers import final, reasoning


def extract(text: str) -> str | None:
    """The final answer (see :func:`final.written`) alone."""
    found = final.written(reasoning.removed(text))
    return found[-1] if found else None


def check(text: str, item: Mapping[str, Any]) -> bool:
    """Whether `text`, or the final answer in it, is just the item's `gold` (or `answer`) (spaces around it aside)."""
    gold, text = str(item.get("gold", item["answer"])).strip(), reasoning.removed(text)
    return gold in (text.strip(), *final.written(text))
