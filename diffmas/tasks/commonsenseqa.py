"""CommonsenseQA: five options each (tau/commonsense_qa).

Evaluated on the validation split, as everywhere: the test split's answers are not public.
"""

from __future__ import annotations

from diffmas.answers import choice
from diffmas.tasks import options
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

TRAIN = Source("tau/commonsense_qa", "train", ("train",))
VALIDATION = Source("tau/commonsense_qa", "validation", ("validation", "test"))


def load(args: TaskArguments) -> Task:
    """Train and validation items."""
    return build("commonsenseqa", args, train=TRAIN, evaluation=VALIDATION, make=item, kind=choice, prompts="choice")


def item(row: Row) -> Item:
    return options.labelled(row, take(row, "question"))
