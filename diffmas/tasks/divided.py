"""Word problems in two parts, so that neither agent has the whole: the sender reads the story, the solver the question.

`svamp` (ChilleD/SVAMP) comes in two parts; `gsm8k:split` is GSM8K with the last sentence as the question.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path

from diffmas.answers import mathematics, numbers
from diffmas.tasks import gsm8k
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

TRAIN = Source("ChilleD/SVAMP", "train", ("train",))
TEST = Source("ChilleD/SVAMP", "test", ("test",))

PROMPTS = Path(__file__).with_suffix(".yaml")
# A point behind a title or an initial ends no sentence; one in a number has no space behind it.
_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?][\"'”’)]*\s+(?=[\"'“‘(]?[A-Z0-9$])")


def load_svamp(args: TaskArguments) -> Task:
    """Train and test items with `evidence`, `question`, `answer` and `gold` (the number)."""
    return _build("svamp", args, TRAIN, TEST, svamp)


def load_gsm8k(args: TaskArguments) -> Task:
    """The same of GSM8K, whose `answer` is the worked solution; problems of one sentence are left out."""
    return _build("gsm8k:split", args, gsm8k.TRAIN, gsm8k.TEST, split)


def _build(name: str, args: TaskArguments, train: Source, test: Source, make: Callable[[Row], Item | None]) -> Task:
    return build(
        name, args, train=train, evaluation=test, make=make, hold_out=_checksum, kind=mathematics, prompts=str(PROMPTS)
    )


def svamp(row: Row) -> Item:
    """Raises `ValueError` for a row without story or question, or whose answer is no number (51.0 is 51)."""
    evidence, question = take(row, "Body", "body"), take(row, "Question", "question")
    given = take(row, "Answer", "answer", what="gold answer")
    if (value := numbers.parse(str(given))) is None:
        raise ValueError(f"the gold answer is {given!r}; allowed: a number")
    gold = numbers.normal(value)
    return {**row, "evidence": evidence.strip(), "question": question.strip(), "answer": gold, "gold": gold}


def split(row: Row) -> Item | None:
    """Raises `ValueError` as :func:`~diffmas.tasks.gsm8k.item` does; None where there is one sentence."""
    item = gsm8k.item(row)
    ends = [match.end() for match in _END.finditer(item["question"].strip())]
    if not ends:
        return None
    text = item["question"].strip()
    return {**item, "evidence": text[: ends[-1]].strip(), "question": text[ends[-1] :]}


def _checksum(item: Item) -> int:
    """Of the story, which the data set may ask several questions about."""
    return zlib.crc32(" ".join(item["evidence"].split()).casefold().encode())
