"""ARC: grade-school science, the easy and the challenge set (allenai/ai2_arc)."""

from __future__ import annotations

from diffmas.answers import choice
from diffmas.tasks import options
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take


def load_easy(args: TaskArguments) -> Task:
    """ARC-Easy."""
    return _load("arc_easy", "ARC-Easy", args)


def load_challenge(args: TaskArguments) -> Task:
    """ARC-Challenge."""
    return _load("arc_challenge", "ARC-Challenge", args)


def _load(name: str, config: str, args: TaskArguments) -> Task:
    train, test = (Source("allenai/ai2_arc", s, (f"{config}-{s.title()}", s), (config,)) for s in ("train", "test"))
    return build(name, args, train=train, evaluation=test, make=item, kind=choice, prompts="choice")


def item(row: Row) -> Item:
    """Options labelled 1 to 4 get letters."""
    return options.labelled(row, take(row, "question"))
