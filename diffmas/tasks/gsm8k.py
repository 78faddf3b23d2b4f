"""GSM8K: grade-school word problems (openai/gsm8k), gold answers behind `####`."""

from __future__ import annotations

from diffmas.answers import mathematics, numbers
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

TRAIN = Source("openai/gsm8k", "train", ("train",), ("main",))
TEST = Source("openai/gsm8k", "test", ("test",), ("main",))


def load(args: TaskArguments) -> Task:
    """Train and test items with `question`, `answer` (the worked solution) and `gold` (the number)."""
    return build("gsm8k", args, train=TRAIN, evaluation=TEST, make=item, kind=mathematics, prompts="reasoning")


def item(row: Row) -> Item:
    """Raises `ValueError` for a row without a question, or without a number behind `####`."""
    question, answer = take(row, "question"), take(row, "answer", what="gold answer")
    _, mark, number = answer.rpartition("####")
    if not mark or (value := numbers.parse(number)) is None:
        raise ValueError(f"the gold answer is missing: no number behind #### in {answer!r}")
    return {**row, "question": question, "answer": answer, "gold": numbers.normal(value)}
