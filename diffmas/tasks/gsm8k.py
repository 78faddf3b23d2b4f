"""GSM8K: grade-school word problems (openai/gsm8k), gold answers behind `####`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from diffmas.tasks.jsonl import read

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# A sign behind a word or a bracket is an operator: "5-10" ends on 10.
_IN_TEXT = re.compile(rf"(?:(?<![\w)])[-+])?\$?{_DIGITS}")
_ALONE = re.compile(rf"[-+]?\$?\s?{_DIGITS}")
_BOXED = re.compile(r"\\boxed\s*\{")


def load(data_dir: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train and test items with `question`, `answer` (the worked solution) and `gold` (the number).

    Read from `train.jsonl` and `test.jsonl` in `data_dir`, or from the hub through `datasets` where that is None.
    """
    if data_dir is not None:
        splits = [read(Path(data_dir) / f"{name}.jsonl", name="data_dir") for name in ("train", "test")]
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
    return tuple([{**item, "gold": gold_answer(item)} for item in split] for split in splits)


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


def check(prediction: str, gold: str) -> bool:
    """Whether the number `prediction` ends on equals `gold`: in the last `\\boxed{}`, behind `####`, or the last one.

    A gold answer that is no number is compared as text. An answer that cannot be read is wrong.
    """
    found = extract(prediction)
    if found is None:
        return False
    a, b = _decimal(found), _decimal(gold)
    if a is None or b is None:
        return found.strip().casefold() == gold.strip().casefold()
    return a == b


def extract(text: str) -> str | None:
    """The final answer in a worked solution, as written; None where there is none."""
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
