"""AIME 2024 and 2025: thirty competition problems each, with integers below 1000 as answers.

Neither has a training set: both train on MATH's (as the task `math` does).
"""

from __future__ import annotations

from diffmas.answers import mathematics, numbers
from diffmas.tasks import math
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

HUB = {"aime24": "HuggingFaceH4/aime_2024", "aime25": "yentinglin/aime_2025"}


def load24(args: TaskArguments) -> Task:
    """AIME 2024, I and II."""
    return _load("aime24", args)


def load25(args: TaskArguments) -> Task:
    """AIME 2025, I and II."""
    return _load("aime25", args)


def _load(name: str, args: TaskArguments) -> Task:
    # On the hub the problems are a split named train.
    source = Source(HUB[name], "train", (name, "test"))
    return build(
        name, args, train=math.TRAIN, evaluation=source, make=item, make_train=math.item, kind=mathematics,
        prompts="reasoning",
    )  # fmt: skip


def item(row: Row) -> Item:
    """Raises `ValueError` for a row without a problem or an integer answer."""
    answer = str(take(row, "answer", "Answer"))
    value = numbers.parse(answer)
    if value is None or value.denominator != 1:
        raise ValueError(f"the gold answer is {answer!r}; allowed: an integer")
    solution = row.get("solution") or row.get("Solution") or f"\\boxed{{{value}}}"
    return {**row, "question": take(row, "problem", "Problem"), "answer": solution, "gold": str(value)}
