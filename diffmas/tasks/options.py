"""Items of multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffmas.answers.choice import LETTERS
from diffmas.tasks.base import Item


def item(row: Mapping[str, Any], question: str, options: Sequence[str], right: int) -> Item:
    """The options go below the question, as "A) …"; `letters` says which there are ("A, B, C, D").

    Raises:
        ValueError: fewer than two options, more than there are letters, or none at index `right`.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"options are {len(options)}; allowed: 2 to {len(LETTERS)}")
    if not 0 <= right < len(options):
        raise ValueError(f"the right option is number {right}; allowed: 0 to {len(options) - 1}")
    options = [str(option).strip() for option in options]
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    gold = LETTERS[right]
    return {
        **row,
        "question": f"{question.strip()}\n{listed}",
        "options": options,
        "letters": ", ".join(LETTERS[: len(options)]),
        "answer": f"\\boxed{{{gold}}}",
        "gold": gold,
    }


def labelled(row: Mapping[str, Any], question: str) -> Item:
    """From the schema of ARC, OpenBookQA and CommonsenseQA: `choices` (`text`, `label`) and `answerKey`."""
    choices, key = row.get("choices") or {}, str(row.get("answerKey") or "").strip()
    labels = [str(label).strip() for label in choices.get("label", ())]
    if key not in labels:
        raise ValueError(
            f"answerKey is {key!r}; allowed: {', '.join(labels) or 'a label of choices, which is missing'}"
        )
    return item(row, question, choices.get("text", ()), labels.index(key))
