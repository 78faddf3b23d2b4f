"""What untrained agents wrote for training items: decided once and for all, so written once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

Texts = dict[str, str]


class TextCache:
    """Texts by agent, by key, in an SQLite file that several processes may share and a kill does not harm.

    Raises:
        OSError: a file that is none of these, or cannot be written.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._database() as database:
            database.execute("CREATE TABLE IF NOT EXISTS texts (key TEXT PRIMARY KEY, texts TEXT NOT NULL)")

    def find(self, keys: Sequence[str]) -> dict[str, Texts]:
        """The texts of those keys that are there."""
        with self._database() as database:
            select = "SELECT texts FROM texts WHERE key = ?"
            rows = {key: database.execute(select, (key,)).fetchone() for key in keys}
        return {key: json.loads(row[0]) for key, row in rows.items() if row is not None}

    def add(self, entries: Mapping[str, Texts]) -> None:
        """On the disk when this returns."""
        with self._database() as database:
            rows = ((key, json.dumps(texts)) for key, texts in entries.items())
            database.executemany("INSERT OR IGNORE INTO texts VALUES (?, ?)", rows)

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        # A connection of its own each time: one does not survive a fork.
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=60)) as database, database:
                yield database
        except sqlite3.Error as error:
            raise OSError(f"{self._path}: {error}; it can be deleted, its texts are written again") from None


def fingerprint(value: Any) -> str:
    """The same for equal values, in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def base_fingerprint(model: nn.Module) -> str:
    """Of the weights that are not trained, bit by bit, and of the configuration."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return fingerprint([digest.hexdigest(), model.config.to_dict()])
