"""Lines about what takes long, where there is no bar: in files, pipes and before a bar can be drawn."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import TaskID

T = TypeVar("T")
#: Seconds after which something has taken long, and between two lines about it.
PATIENCE, APART = 3.0, 20.0


@contextlib.contextmanager
def announced(what: str, *, show: bool = True) -> Iterator[None]:
    """Say on a line what is being done, once it has taken :data:`PATIENCE` seconds."""
    timer = threading.Timer(PATIENCE, lambda: print(f"{what} …", flush=True))
    timer.daemon = True
    if show:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def counted(steps: Iterable[T], what: str, *, show: bool = True) -> Iterator[T]:
    """`steps`, with a line on how far they are after :data:`PATIENCE` seconds and every :data:`APART` seconds on."""
    total = f" of {len(steps)}" if isinstance(steps, Sized) else ""
    due = time.monotonic() + PATIENCE
    for number, step in enumerate(steps):
        if show and time.monotonic() >= due:
            print(f"{what}: {number}{total}", flush=True)
            due = time.monotonic() + APART
        yield step


class Lines:
    """Takes the place of rich's `Progress` where there is no terminal.

    A line after :data:`PATIENCE` seconds and every :data:`APART` seconds on, whether or not anything was finished.
    """

    def __init__(self, show: bool):
        self._show, self._over = show, threading.Event()
        self._description, self._total, self._done = "", 0.0, 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error) -> None:
        self._over.set()

    def _tell(self) -> None:
        wait = PATIENCE
        while not self._over.wait(wait):
            print(f"{self._description}: {self._done:g} of {self._total:g}", flush=True)
            wait = APART

    def add_task(self, description: str, total: float, completed: float = 0) -> TaskID:
        self._description, self._total, self._done = description, total, completed
        if self._show:
            threading.Thread(target=self._tell, daemon=True).start()
        return TaskID(0)

    def update(self, task: TaskID, *, description: str | None = None, advance: float = 0) -> None:
        self._description = description or self._description
        self.advance(task, advance)

    def advance(self, task: TaskID, advance: float = 1) -> None:
        self._done += advance


def terminal() -> bool:
    """Whether a bar can be drawn."""
    return Console().is_terminal
