"""MedQA: questions of the US medical licensing examination with four options (GBaker/MedQA-USMLE-4-options-hf)."""

from __future__ import annotations

from diffmas.answers import choice
from diffmas.tasks import options
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

TRAIN = Source("GBaker/MedQA-USMLE-4-options-hf", "train", ("train",))
TEST = Source("GBaker/MedQA-USMLE-4-options-hf", "test", ("test",))


def load(args: TaskArguments) -> Task:
    """Train and test items."""
    return build("medqa", args, train=TRAIN, evaluation=TEST, make=item, kind=choice, prompts="choice")


def item(row: Row) -> Item:
    endings = [take(row, f"ending{i}") for i in range(4)]
    question = " ".join(str(row[name]).strip() for name in ("sent1", "sent2") if row.get(name))
    return options.item(row, take({"sent1": question}, "sent1"), endings, int(take(row, "label")))
