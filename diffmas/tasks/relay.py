"""Relay: one agent reads the evidence, another one answers a question about it.

A row's evidence gives every slot a value (``A7 B12 C0``) and its question names one slot (``Recall B``). Only the
sender's role sees the evidence and only the solver's role sees the question (``relay.yaml``), so an answer better than
one in ``values`` is information that came through the latent channel.
"""

from __future__ import annotations

import random
import re
import string
import zlib
from collections.abc import Sequence
from pathlib import Path

from diffmas.answers import reasoning
from diffmas.prompts import Prompts
from diffmas.tasks import base

SLOTS = string.ascii_uppercase[:16]
SPLITS = ("train", "eval")
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


class Relay(Sequence):
    """``size`` rows ``{"evidence", "question", "answer"}`` of one split, drawn on demand.

    Row i depends on ``(split, slots, values, seed, i)`` alone. The splits share no evidence whatever the seeds: a
    checksum of the evidence decides to which of the two it belongs.

    Raises ``ValueError`` for an unknown split, ``slots`` outside 1 … 16, or so few slots and values (under 256
    different evidences) that the splits could not be kept apart.
    """

    #: Made when looked at, with the same fields each.
    drawn = True

    def __init__(self, split: str = "train", *, size: int = 1024, slots: int = 8, values: int = 16, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if size < 0:
            raise ValueError(f"size must be 0 or more, got {size}")
        if not 1 <= slots <= len(SLOTS):
            raise ValueError(f"slots must be 1 to {len(SLOTS)}, got {slots}")
        if values < 2 or values**slots < 256:
            raise ValueError(f"values must be 2 or more and values ** slots 256 or more, got {values} ** {slots}")
        self.split, self.size, self.slots, self.values, self.seed = split, size, slots, values, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, str]:
        if not -self.size <= index < self.size:
            raise IndexError(f"index must be in {-self.size} … {self.size - 1}, got {index}")
        rng = random.Random(f"relay/{self.split}/{self.seed}/{index % self.size}")
        while True:
            row = make_row(rng, SLOTS[: self.slots], self.values)
            if SPLITS[zlib.crc32(row["evidence"].encode()) % len(SPLITS)] == self.split:
                return row


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
        for split, size in (("train", args.train_size or 131_072), ("eval", args.eval_size or 1024))
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
