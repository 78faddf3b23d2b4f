"""Procedural reasoning tasks of the package reasoning-gym: `rg:<name>`, with its own scoring.

`rg:chain_sum:max_terms=3:size=50000` also sets the data set's options (between colons or commas). A checksum of the
question decides whether an item is held out, so no question is both trained on and evaluated.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from diffmas.answers import final, reasoning
from diffmas.prompts import Prompts
from diffmas.tasks import base
from diffmas.tasks.base import Item, Task, TaskArguments

PREFIX = "rg:"
#: One in so many questions is held out.
HELD_OUT = 8
DEFAULT_SIZE, DEFAULT_EVAL_SIZE = 100_000, 256

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def load(args: TaskArguments) -> Task:
    """Items drawn from the data set with `args.task_seed`; a prediction is right where the package scores it 1.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: an unknown data set, or options it does not take.
    """
    name, options = base.parse_options(args.task.removeprefix(PREFIX))
    # Data sets draw item i with seed + i: neighbouring seeds would share almost all items.
    dataset = _dataset(name, {"size": DEFAULT_SIZE, "seed": args.task_seed * 1_000_000_007, **options})
    held_out = list(_held_out(dataset, args.eval_size or DEFAULT_EVAL_SIZE, name))
    prompts = Prompts.load(args.prompts or "procedural")
    return Task(
        name,
        Drawn(dataset, args.train_size),
        held_out,
        prompts,
        functools.partial(check, dataset.score_answer),
        extract,
    )


class Drawn(Sequence):
    """Items to train on, generated when they are looked at; item i depends on the data set and i alone."""

    #: With the same fields each.
    drawn = True

    def __init__(self, dataset: Any, size: int | None = None):
        self._dataset, self._size = dataset, len(dataset) if size is None else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index):
        if not -self._size <= index < self._size:
            raise IndexError(f"index must be in {-self._size} … {self._size - 1}, got {index}")
        index %= self._size
        for step in range(len(self._dataset)):
            item = _item(self._dataset[(index + 7919 * step) % len(self._dataset)])
            if not _is_held_out(item):
                return item
        raise ValueError("all questions of the data set are held out; allowed: one with more different questions")


def check(score: Callable[[str, Any], float], text: str, item: Item) -> bool:
    """Whether the data set gives the answer in `text` the full score."""
    found = answer(text)
    # Some data sets compute what an answer says: a tower of powers would never end.
    if not found or ("**" in found and "**" not in str(item["answer"])):
        return False
    try:
        return score(found, item) >= 1.0
    except Exception:  # whatever a scorer makes of what a model wrote
        return False


def extract(text: str) -> str | None:
    """The answer, with spaces and case levelled."""
    found = answer(text)
    return " ".join(found.split()).casefold() if found else None


def answer(text: str) -> str | None:
    """What the last `<answer>…</answer>` holds, or the last `\\boxed{}`, or else the whole text."""
    text = reasoning.removed(text)
    tagged = _TAGGED.findall(text)
    found = tagged[-1] if tagged else final.boxed(text)
    return (text if found is None else found).strip() or None


def _dataset(name: str, options: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ModuleNotFoundError(
            f"task rg:{name} is made by the package reasoning-gym, which is not installed; install diffmas[procedural]"
        ) from None
    if name not in DATASETS:
        raise ValueError(f"task is 'rg:{name}'; allowed after rg: {', '.join(sorted(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(name, **options)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"task rg:{name} refuses {options}: {error}") from None


def _held_out(dataset: Any, size: int, name: str):
    seen = set()
    for index in range(len(dataset)):
        item = _item(dataset[index])
        if _is_held_out(item) and item["question"] not in seen:
            seen.add(item["question"])
            yield item
            if len(seen) == size:
                return
        if index > 1000 * HELD_OUT and not seen:
            break
    if not seen:
        raise ValueError(f"task rg:{name} has no question to hold out; allowed: options that make more of them")


def _item(entry: Any) -> Item:
    return {**entry, "question": str(entry["question"]), "answer": str(entry["answer"])}


def _is_held_out(item: Item) -> bool:
    return zlib.crc32(item["question"].encode()) % HELD_OUT == 0
