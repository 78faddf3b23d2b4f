"""Items that are made when they are looked at, with what is evaluated held out by a checksum of the content."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffmas.prompts import Prompts
from diffmas.tasks import base

SPLITS = ("train", "eval")
TRAIN_SIZE, EVAL_SIZE = 131_072, 1024


class Drawn(Sequence):
    """``size`` items of one split; item i depends on ``(name, split, seed, i)`` and on what ``make`` does alone.

    The splits share no content whatever the sizes and seeds: its checksum decides to which of the two it belongs.

    Args:
        make: an item from a random number generator.
        content: of an item, what no item of the other split has too.

    Raises:
        ValueError: an unknown split, or a negative size.
    """

    #: Made when looked at, with the same fields each.
    drawn = True

    def __init__(
        self,
        name: str,
        split: str,
        make: Callable[[random.Random], base.Item],
        content: Callable[[base.Item], str],
        *,
        size: int,
        seed: int = 0,
    ):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if size < 0:
            raise ValueError(f"size must be 0 or more, got {size}")
        self.name, self.split, self.size, self.seed = name, split, size, seed
        self._make, self._content = make, content

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> base.Item:
        if not -self.size <= index < self.size:
            raise IndexError(f"index must be in {-self.size} … {self.size - 1}, got {index}")
        rng = random.Random(f"{self.name}/{self.split}/{self.seed}/{index % self.size}")
        while True:
            item = self._make(rng)
            if SPLITS[zlib.crc32(self._content(item).encode()) % len(SPLITS)] == self.split:
                return item


def content(item: base.Item) -> str:
    """What items of tasks in words say, however it is worded and in whatever order."""
    return item["content"]


def options(task: str, allowed: Mapping[str, range | tuple[str, ...]]) -> dict[str, Any]:
    """The options in `name:option=value:…`; a range holds integers, a tuple words.

    Raises:
        ValueError: an option that is not among those `allowed`, or a value that is not.
    """
    _, given = base.parse_options(task)
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(f"task is {task!r}, with option {key!r}; allowed: {', '.join(allowed)}")
        values = allowed[key]
        if isinstance(value, bool) or value not in values:
            told = f"{values[0]} to {values[-1]}" if isinstance(values, range) else ", ".join(values)
            raise ValueError(f"task is {task!r}: {key} is {value!r}; allowed: {told}")
    return given


def build(
    args: base.TaskArguments,
    name: str,
    make: Callable[[random.Random], base.Item],
    check: Callable[[str, base.Item], bool],
    extract: Callable[[str], str | None],
) -> base.Task:
    """A task of items in words that `make` draws, with the role prompts beside this file."""
    train, evaluation = (
        Drawn(name, split, make, content, size=size, seed=args.task_seed)
        for split, size in (("train", args.train_size or TRAIN_SIZE), ("eval", args.eval_size or EVAL_SIZE))
    )
    prompts = Prompts.load(args.prompts or Path(__file__).with_name(f"{name}.yaml"))
    return base.Task(name, train, evaluation, prompts, check, extract)
