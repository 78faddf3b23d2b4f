"""One process, or one group of them, at a time writes into a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Hold `folder`, made where there is none; the system lets go of it however the process ends.

    Args:
        wait: for a process that holds it.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BlockingIOError(f"{folder} is being written by another process; allowed: one at a time") from None
        # A worker that outlives this process would hold on to it.
        os.register_at_fork(after_in_child=file.close)
        yield
