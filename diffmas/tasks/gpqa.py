"""GPQA-Diamond: graduate-level science (Idavidrein/gpqa, gated on the hub).

The right option comes first in the file, so options are shuffled, the same way on every run: by a checksum of the
question. There is no training set; it trains on those of the extended set (546 questions) that are not in Diamond.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from diffmas.answers import choice
from diffmas.tasks import options
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

EXTENDED = Source("Idavidrein/gpqa", "train", ("gpqa_extended", "train"), ("gpqa_extended",))
DIAMOND = Source("Idavidrein/gpqa", "train", ("gpqa_diamond", "test"), ("gpqa_diamond",))


def load(args: TaskArguments) -> Task:
    """Diamond's 198 questions, and the extended set's others."""
    return build(
        "gpqa", args, train=EXTENDED, evaluation=DIAMOND, make=item, keep=_not_held_out, kind=choice, prompts="choice"
    )


def item(row: Row) -> Item:
    question = take(row, "Question")
    answers = [take(row, "Correct Answer"), *(take(row, f"Incorrect Answer {i}") for i in (1, 2, 3))]
    order = list(range(4))
    random.Random(f"gpqa/{question}").shuffle(order)
    return options.item(row, question, [answers[i] for i in order], order.index(0))


def _not_held_out(row: Row, held_out: Sequence[Item]) -> bool:
    return row.get("Question") not in {other["Question"] for other in held_out}
