"""Relay: one agent reads the evidence, another one answers a question about it.

A row's evidence gives every slot a value (``A7 B12 C0``) and its question names one slot (``Recall B``). Only the
sender's role sees the evidence and only the solver's role sees the question (``relay.yaml``), so an answer better than
one in ``values`` is information that came through the latent channel.
"""

from __future__ import annotations

import functools
import operator
import random
import re
import string
from collections.abc import Sequence
from pathlib import Path

from diffmas.answers import reasoning
from diffmas.prompts import Prompts
from diffmas.tasks import base
from diffmas.tasks.drawn import EVAL_SIZE, TRAIN_SIZE, Drawn

SLOTS = string.ascii_uppercase[:16]
OPTIONS = ("slots", "values")
PAIR = re.compile(r"([A-P])(\d+)")


def question(slot: str) -> str:
    """What is asked to learn the value of ``slot``; the slot comes last."""
    return f"Recall {slot}"


def make_row(rng: random.Random, slots: Sequence[str], values: int) -> dict[str, str]:
    """Draw a value in ``0 … values-1`` for every slot, in the order given, and ask for one of them."""
    drawn = [rng.randrange(values) for _ in slots]
    asked = rng.randrange(len(slots))
    return {
        "evidence": " ".join(f"{slot}{value}" for slot, value in zip(slots, drawn, strict=True)),
        "question": question(slots[asked]),
        "answer": str(drawn[asked]),
    }


class Relay(Drawn):
    """``size`` rows ``{"evidence", "question", "answer"}`` of one split, drawn on demand; none share their evidence.

    Raises ``ValueError`` for an unknown split, ``slots`` outside 1 … 16, or so few slots and values (under 256
    different evidences) that the splits could not be kept apart.
    """

    def __init__(self, split: str = "train", *, size: int = 1024, slots: int = 8, values: int = 16, seed: int = 0):
        if not 1 <= slots <= len(SLOTS):
            raise ValueError(f"slots must be 1 to {len(SLOTS)}, got {slots}")
        if values < 2 or values**slots < 256:
            raise ValueError(f"values must be 2 or more and values ** slots 256 or more, got {values} ** {slots}")
        self.slots, self.values = slots, values
        make = functools.partial(make_row, slots=SLOTS[:slots], values=values)
        super().__init__("relay", split, make, operator.itemgetter("evidence"), size=size, seed=seed)


def load(args: base.TaskArguments) -> base.Task:
    """Items drawn on demand, with role prompts of their own (``relay.yaml``).

    `relay:slots=8:values=16` says how many slots the evidence has, and how many values a slot can take.

    Raises:
        ValueError: an option that relay does not have, or a number that it does not take.
    """
    _, options = base.parse_options(args.task)
    if wrong := {k: v for k, v in options.items() if k not in OPTIONS or type(v) is not int}:
        raise ValueError(f"task is {args.task!r}, with {wrong}; allowed: integers for {' and '.join(OPTIONS)}")
    train, evaluation = (
        Relay(split, size=size, seed=args.task_seed, **options)
        for split, size in (("train", args.train_size or TRAIN_SIZE), ("eval", args.eval_size or EVAL_SIZE))
    )
    prompts = Prompts.load(args.prompts or Path(__file__).with_suffix(".yaml"))
    return base.Task("relay", train, evaluation, prompts, check, extract)


def check(prediction: str, item: base.Item) -> bool:
    """Whether the first whole number in ``prediction`` is the item's answer; a prediction without one is wrong."""
    return extract(prediction) == str(int(item["answer"]))


def extract(prediction: str) -> str | None:
    """The first whole number in ``prediction``."""
    number = re.search(r"[0-9]+", reasoning.removed(prediction))
    return None if number is None else number.group().lstrip("0") or "0"
