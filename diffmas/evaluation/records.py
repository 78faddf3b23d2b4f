"""Evaluated answers in a file that survives a kill: appended as they finish, read back without the torn last line."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from diffmas.support.failures import writing
from diffmas.support.valid_json import to_json

#: What names an answer: nothing with the same values is kept twice.
KEY = ("task", "method", "control", "seed", "index", "sample")
_UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Record:
    """One generated answer to one item.

    Attributes:
        index, sample: the item's place in the evaluation set; which of its n answers this is.
        prompt: the last agent's, as text. `answer`: what it wrote. `extracted`: the final answer in it, normalised.
        tokens: generated tokens of the answer. `message_tokens`: of the texts earlier agents wrote for the item.
        latent_steps, prefill_tokens: of all agents, spent once for the item and shared by its samples.
        entropies: entropy in nats of the distribution each answer token came from.
        logprob: log-probability in nats of the answer, summed over its tokens.
        finish: why generation ended. `seconds`: the batch's wall-clock time divided by its answers.
        cut_tokens: what `--max_prompt_tokens` cut of the item's prompts, over all agents.
    """

    task: str
    method: str
    control: str
    seed: int
    index: int
    sample: int
    prompt: str
    answer: str
    gold: str
    extracted: str | None
    correct: bool
    tokens: int
    message_tokens: int
    latent_steps: int
    prefill_tokens: int
    entropies: list[float]
    logprob: float
    finish: str
    seconds: float
    cut_tokens: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)


class RecordFile:
    """A JSONL file of records that one process at a time appends to.

    Lines go to the disk whole, in the order given; what a killed process left of a line is cut off when the file is
    opened again. A record whose key is there already is not written again.

    Raises:
        BlockingIOError: another process has the file open.
        ValueError: a line in the middle that is no record.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BlockingIOError(f"{path} is being written by another process; allowed: one at a time") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        self.records = _parse(content[:whole], path)
        self.keys = {record.key for record in self.records}

    def append(self, records: Iterable[Record]) -> None:
        """Write records that are not there yet; on the disk when this returns."""
        new = []
        for record in records:
            if record.key not in self.keys:
                self.keys.add(record.key)
                new.append(record)
        with writing(self._file.name):
            self._file.write("".join(to_json(asdict(record)) + "\n" for record in new).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.records += new

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class UnfinishedRecords:
    """Records of one evaluation until all of them are there, beside what decides them: others start anew.

    Args:
        folder: where the evaluation's results go.
        decided_by: whatever the records depend on, as JSON writes it.
    """

    def __init__(self, folder: str | Path, decided_by: Any):
        decided = hashlib.sha256(json.dumps(decided_by, sort_keys=True, default=repr).encode()).hexdigest()
        self._others = Path(folder).glob(f".{_UNFINISHED}-*.jsonl")
        self._path = Path(folder, f".{_UNFINISHED}-{decided[:16]}.jsonl")

    def opened(self) -> RecordFile:
        """The file to go on with; those that other evaluations have left are removed."""
        for path in self._others:
            if path != self._path:
                path.unlink(missing_ok=True)
        return RecordFile(self._path)

    def remove(self) -> None:
        """All of them are there, and kept elsewhere."""
        self._path.unlink(missing_ok=True)


def read_records(path: str | Path) -> list[Record]:
    """The records of a file, without a torn last line; none where there is no file."""
    path = Path(path)
    if not path.is_file():
        return []
    content = path.read_bytes()
    return _parse(content[: content.rfind(b"\n") + 1], path)


def _parse(content: bytes, path: Path) -> list[Record]:
    names, records = {f.name for f in fields(Record)}, {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = Record(**{k: v for k, v in json.loads(line).items() if k in names})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} line {number} is no record: {error}") from None
        records.setdefault(record.key, record)
    return list(records.values())
