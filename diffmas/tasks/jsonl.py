"""Any JSONL file as a task: one object a line, with a field that holds the question and one that holds the answer."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffmas.answers import final, mathematics
from diffmas.prompts import Prompts
from diffmas.support.text_file import check_characters, read_text
from diffmas.tasks import base, checkers


def read(path: str | Path, *, name: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file; errors name the argument `name`.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: a folder.
        ValueError: no UTF-8, a line that is no JSON object or names a field twice, or no line at all.
    """
    path, items = Path(path), []
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file: {path}")
    for number, line in enumerate(io.StringIO(read_text(path, name)), 1):
        if not line.strip():
            continue
        where = f"{name}: {path} line {number}"
        try:
            item = json.loads(line, object_pairs_hook=_once, parse_constant=_refused)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(item, dict):
            raise ValueError(f"{where} is {type(item).__name__}; allowed: a JSON object")
        if "\\u" in line:
            check_characters(item, where)
        items.append(item)
    if not items:
        raise ValueError(f"{name}: {path} is empty; allowed: at least one item")
    return items


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there more than once")
    return found


def load(args: base.TaskArguments) -> base.Task:
    """The file `args.task`; its answers may be worked solutions that end on `####` or in `\\boxed{}`.

    Says which checker it chose where `args.checker` names none.

    Raises:
        ValueError: an item that its checker cannot use, or whose right answer counts as wrong.
    """
    train, evaluation = items(args.task, args.eval_file, args.fields, args.eval_size)
    held_out = (args.eval_file, 1) if args.eval_file is not None else (args.task, len(train) + 1)
    prompts = None if args.prompts is None else Prompts.load(args.prompts)
    task = _task(train, evaluation, prompts, args.checker, (args.task, 1), held_out)
    return replace(task, name=Path(args.task).name.partition(".jsonl")[0], train=task.train[: args.train_size])


def task_of(
    train: Sequence[Mapping[str, Any]],
    evaluation: Sequence[Mapping[str, Any]],
    prompts: Prompts,
    checker: str | None = None,
) -> base.Task:
    """Items in memory as a task; they have an `answer`, and the fields that `prompts` name.

    `checker` is as for :class:`~diffmas.tasks.base.TaskArguments`: without one it is chosen from the right answers, and
    said.

    Raises:
        ValueError: an item that its checker cannot use, or whose right answer counts as wrong.
    """
    if not (train or evaluation):
        raise ValueError("train_dataset and eval_dataset are empty; allowed: at least one item")

    def with_gold(name: str, found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [_with_gold(dict(item), name, i) for i, item in enumerate(found, 1)]

    made = with_gold("train_dataset", train), with_gold("eval_dataset", evaluation)
    return _task(*made, prompts, checker, ("train_dataset", 1), ("eval_dataset", 1))


def _task(train, evaluation, prompts, name: str | None, of_train: tuple[str, int], held_out: tuple[str, int]):
    """The task of items with `gold`; `of_train`, `held_out`: where they come from, and the number of the first."""
    both = [*train, *evaluation]
    checker = checkers.load(checkers.chosen(both) if name is None else name)
    if name is None and evaluation:
        _announce(of_train[0] if train else held_out[0], checker.name)
    if checker.name == "mathematics":
        mathematics.require((item["gold"] for item in both), of_train[0])
    letters = checkers.letters(both)
    return base.Task(
        "own",
        _fitted(checker, train, letters, *of_train, run=False),
        _fitted(checker, evaluation, letters, *held_out, run=True),
        prompts or Prompts.load(checker.prompts),
        checker.check,
        checker.extract,
        checker.ready,
        checker=checker.name,
    )


def _fitted(
    checker: checkers.Checker, found: list[dict[str, Any]], letters: int, path: str, first: int, *, run: bool
) -> list[dict[str, Any]]:
    """Items as the checker needs them, each of whose right answers passes it; `first` is the number of the first."""
    made = []
    for number, item in enumerate(found, first):
        try:
            made.append(checkers.fitted(checker.name, item, letters))
        except ValueError as error:
            raise ValueError(f"{path} item {number}: {error}") from None
    checkers.verify(checker, made, path, first, run=run)
    return made


@functools.cache
def _announce(path: str, checker: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"checker: {checker}, chosen from the right answers in {path} (--checker names another)", flush=True)


def items(
    path: str, eval_file: str | None, fields: str, eval_size: int | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train and evaluation items, with `question` and `answer` taken from `fields` ("question,answer").

    Without `eval_file` the last `eval_size` items (default: a tenth) are held out.
    """
    names = [f.strip() for f in fields.split(",")]
    if len(names) != 2 or not all(names):
        raise ValueError(f"fields is {fields!r}; allowed: two names, question and answer, separated by a comma")
    found = [_mapped(item, names, path, i) for i, item in enumerate(read(path, name="task"), 1)]
    if eval_file is not None:
        held_out = read(eval_file, name="eval_file")
        return found, [_mapped(item, names, eval_file, i) for i, item in enumerate(held_out, 1)]
    count = eval_size or max(1, len(found) // 10)
    if count >= len(found):
        raise ValueError(
            f"eval_size is {count} of {len(found)} items in {path}; allowed: fewer, so that some are left to train on"
        )
    return found[:-count], found[-count:]


def _mapped(item: dict[str, Any], names: list[str], path: str, number: int) -> dict[str, Any]:
    question, answer = (item.get(name) for name in names)
    for kind, name, value in (("question", names[0], question), ("gold answer", names[1], answer)):
        if value is None or not str(value).strip():
            raise ValueError(f"{path} item {number}: the {kind} is missing (field {name!r})")
    return _with_gold({**item, "question": str(question), "answer": str(answer)}, path, number, names[1])


def _with_gold(item: dict[str, Any], path: str, number: int, field: str = "answer") -> dict[str, Any]:
    """With what tables show as the right answer, taken from a worked one."""
    if item.get("answer") is None or not str(item["answer"]).strip():
        raise ValueError(f"{path} item {number}: the gold answer is missing (field {field!r})")
    answer = str(item["answer"])
    gold = (answer.rpartition("####")[2] if "####" in answer else final.boxed(answer) or answer).strip()
    if not gold:
        raise ValueError(f"{path} item {number}: the gold answer is missing (nothing behind #### in field {field!r})")
    return {**item, "answer": answer, "gold": gold}
