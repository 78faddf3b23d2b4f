"""OpenBookQA: elementary science with common knowledge (allenai/openbookqa, main)."""

from __future__ import annotations

from diffmas.answers import choice
from diffmas.tasks import options
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

TRAIN = Source("allenai/openbookqa", "train", ("train",), ("main",))
TEST = Source("allenai/openbookqa", "test", ("test",), ("main",))


def load(args: TaskArguments) -> Task:
    """Train and test items."""
    return build("openbookqa", args, train=TRAIN, evaluation=TEST, make=item, kind=choice, prompts="choice")


def item(row: Row) -> Item:
    return options.labelled(row, take(row, "question_stem"))
