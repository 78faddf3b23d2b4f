"""GSM8K: grade-school word problems (openai/gsm8k), gold answers behind `####`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from diffmas.prompts import Prompts
from diffmas.tasks import base
from diffmas.tasks.jsonl import read

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# A sign behind a word or a bracket is an operator: "5-10" ends on 10.
_IN_TEXT = re.compile(rf"(?:(?<![\w)])[-+])?\$?{_DIGITS}")
_ALONE = re.compile(rf"[-+]?\$?\s?{_DIGITS}")
_BOXED = re.compile(r"\\boxed\s*\{")


def load(args: base.TaskArguments) -> base.Task:
    """Train and test items with `question`, `answer` (the worked solution) and `gold` (the number).

    Read from `train.jsonl` and `test.jsonl` in `args.data_dir`, or from the hub through `datasets` where that is None.
    """
    if args.data_dir is not None:
        splits = [read(Path(args.data_dir) / f"{name}.jsonl", name="data_dir") for name in ("train", "test")]
    else:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ModuleNotFoundError(
                "task gsm8k reads from the hub through the package datasets, which is not installed; "
                "install diffmas[data], or give --data_dir a folder with train.jsonl and test.jsonl"
            ) from None
        hub = load_dataset("openai/gsm8k", "main")
        splits = [list(hub[name]) for name in ("train", "test")]
    train, evaluation = ([{**item, "gold": gold_answer(item)} for item in split] for split in splits)
    return base.Task("gsm8k", train, evaluation, Prompts.load(args.prompts or "reasoning"), check, extract)


def gold_answer(item: Mapping[str, Any]) -> str:
    """The number behind `####`, without thousands separators.

    Raises:
        ValueError: an item without a question, or without a number behind `####`.
    """
    if not item.get("question"):
        raise ValueError(f"question is missing in the item {dict(item)!r}")
    _, mark, number = str(item.get("answer", "")).rpartition("####")
    value = _decimal(number) if mark else None
    if value is None:
        raise ValueError(f"the gold answer is missing: no number behind #### in {item.get('answer')!r}")
    return format(value, "f")


def check(prediction: str, item: base.Item) -> bool:
    """Whether the number `prediction` ends on is the item's: in the last `\\boxed{}`, behind `####`, or the last one.

    A gold answer that is no number is compared as text. An answer that cannot be read is wrong.
    """
    found = extract(prediction)
    return found is not None and found == normal(base.gold(item))


def extract(text: str) -> str | None:
    """The final answer in a worked solution in normal form; None where there is none."""
    found = _final(text)
    return None if found is None else normal(found)


def normal(answer: str) -> str:
    """A number without separators, units of money or trailing zeros; anything else stripped and in lower case."""
    value = _decimal(answer)
    return answer.strip().casefold() if value is None else format(value, "f")


def _final(text: str) -> str | None:
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    _, mark, tail = text.rpartition("####")
    if mark:
        return tail.strip().splitlines()[0].strip() if tail.strip() else None
    numbers = _IN_TEXT.findall(text)
    return numbers[-1] if numbers else None


def _last_boxed(text: str) -> str | None:
    starts = [m.end() for m in _BOXED.finditer(text)]
    if not starts:
        return None
    depth = 1
    for i in range(starts[-1], len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            inner = text[starts[-1] : i].strip()
            wrapped = re.fullmatch(r"\\(?:text|mathrm|mathbf)\s*\{(.*)\}", inner, re.DOTALL)
            return (wrapped.group(1) if wrapped else inner).strip()
    return None


def _decimal(text: str) -> Decimal | None:
    """The one number in `text`: "$70,000.00" is 70000; None where it is not exactly one number."""
    cleaned = text.strip().rstrip(".").strip("$% ").replace("\\$", "").replace("\\,", "").replace("{,}", "")
    return Decimal(re.sub(r"[,$\s]", "", cleaned)).normalize() if _ALONE.fullmatch(cleaned) else None
