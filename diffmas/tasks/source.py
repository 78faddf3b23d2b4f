"""Where a task's rows come from: a data set of the Hugging Face hub, or the same files in a local folder."""

from __future__ import annotations

import csv
import functools
import io
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffmas.prompts import Prompts
from diffmas.support.failures import reading
from diffmas.support.text_file import read_text
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.jsonl import read

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")


@dataclass(frozen=True)
class Source:
    """One split of a data set.

    Args:
        hub: id on the hub. split: its name there. configs: read one after the other; None is the only one.
        files: stems of the files that hold it in a local folder, the first that exists counts.
    """

    hub: str
    split: str
    files: tuple[str, ...]
    configs: tuple[str | None, ...] = (None,)

    def rows(self, data_dir: str | None, task: str) -> list[dict[str, Any]]:
        """All rows, from the folder `data_dir` or, where that is None, from the hub.

        A folder holds `<stem>.jsonl`, `.jsonl.gz`, `.csv` or `.parquet`, or the hub's own layout
        (`<config>/<stem>-00000-of-00001.parquet`).

        Raises:
            FileNotFoundError: no such folder, or none of the files in it.
            ModuleNotFoundError: the package `datasets` is needed and not installed.
            ValueError: a file that holds no rows.
        """
        if data_dir is not None:
            return self._local(Path(data_dir), task)
        load = _datasets(task, f"give --data_dir a folder with {self.files[0]}.jsonl")
        return [row for config in self.configs for row in map(dict, load(self.hub, config, split=self.split))]

    def _local(self, folder: Path, task: str) -> list[dict[str, Any]]:
        if not folder.is_dir():
            raise FileNotFoundError(f"data_dir: no such folder: {folder}")
        configs = [folder / config for config in self.configs if config and (folder / config).is_dir()]
        found = [paths for place in configs or [folder, folder / "data"] if (paths := self._files(place))]
        if not found:
            names = ", ".join(stem + suffix for stem in self.files for suffix in SUFFIXES)
            raise FileNotFoundError(f"data_dir: task {task} finds none of its files in {folder}; allowed: {names}")
        return [row for paths in (found if configs else found[:1]) for path in paths for row in _read(path, task)]

    def _files(self, place: Path) -> list[Path]:
        for stem in self.files:
            for suffix in SUFFIXES:
                if (path := place / f"{stem}{suffix}").is_file():
                    return [path]
            if shards := sorted(place.glob(f"{stem}-*-of-*.parquet")):
                return shards
        return []


def _datasets(task: str, instead: str) -> Callable:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ModuleNotFoundError(
            f"task {task} reads through the package datasets, which is not installed; install diffmas[data], or "
            f"{instead}"
        ) from None
    return load_dataset


def _read(path: Path, task: str) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        load = _datasets(task, f"convert {path.name} to JSON lines")
        with reading(f"data_dir: {path}"):
            rows = [dict(row) for row in load("parquet", data_files=str(path), split="train")]
    elif path.suffix == ".csv":
        rows = _read_csv(path)
    else:
        return read(path, name="data_dir")
    if not rows:
        raise ValueError(f"data_dir: {path} is empty; allowed: at least one item")
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    # Python's own limit is 128 KiB a cell.
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(read_text(path, "data_dir"), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"more than the {len(reader.fieldnames)} cells of the first line")
            rows.append(row)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"data_dir: {path} line {reader.line_num} is not CSV: {error}") from None
    return rows


class Items(Sequence):
    """Items read when they are first looked at: an evaluation alone needs no training file."""

    def __init__(self, load: Callable[[], list[Item]]):
        self._load = load

    @functools.cached_property
    def items(self) -> list[Item]:
        return self._load()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def build(
    name: str,
    args: TaskArguments,
    *,
    train: Source,
    evaluation: Source,
    make: Callable[[Row], Item | None],
    make_train: Callable[[Row], Item | None] | None = None,
    hold_out: Callable[[Item], Hashable] | None = None,
    keep: Callable[[Row, Sequence[Item]], bool] = lambda row, held_out: True,
    kind: Any,
    prompts: str,
    ready: Callable[[], None] = lambda: None,
) -> Task:
    """A task from two sources.

    Args:
        make, make_train: an item from a row of `evaluation` and of `train` (default: the same); ValueError for a row
            they cannot use, None for one that is left out.
        hold_out: of an item, what none that is trained on has in common with one that is evaluated.
        keep: whether a row may be trained on, given the evaluation's items.
        kind: module with `check` and `extract`. prompts: family of role prompts. ready: see :class:`Task`.
    """
    held_out = _made(make, evaluation.rows(args.data_dir, name), name, evaluation)
    if not held_out:
        raise ValueError(f"task {name} can use none of the rows of {evaluation.split}; allowed: at least one")

    def load() -> list[Item]:
        rows = [row for row in train.rows(args.data_dir, name) if keep(row, held_out)]
        items = _made(make_train or make, rows, name, train)
        if hold_out is not None:
            known = {hold_out(item) for item in held_out}
            items = [item for item in items if hold_out(item) not in known]
        return items[: args.train_size]

    loaded = Prompts.load(args.prompts or prompts)
    return Task(name, Items(load), held_out, loaded, kind.check, kind.extract, ready)


def _made(make: Callable[[Row], Item | None], rows: Sequence[Row], task: str, source: Source) -> list[Item]:
    items = []
    for number, row in enumerate(rows, 1):
        try:
            item = make(row)
        except ValueError as error:
            raise ValueError(f"task {task}, {source.split} item {number}: {error}") from None
        if item is not None:
            items.append(item)
    return items


def take(row: Row, *names: str, what: str | None = None) -> Any:
    """The first of the fields `names` that the row has; ValueError where all are missing or empty."""
    for name in names:
        if (value := row.get(name)) is not None and (not isinstance(value, str) or value.strip()):
            return value
    raise ValueError(f"the {what or names[0]} is missing (field {' or '.join(names)}; the row has {', '.join(row)})")
