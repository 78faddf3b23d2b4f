"""Families one by one, each in a process of its own with a time limit, so that nothing ends the walk."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
import transformers

from benchmarks.models.comparison import (
    CRASH,
    EXACT,
    NO_ORACLE,
    ORDER,
    REFUSED,
    UNBUILT,
    UNFINISHED,
    Case,
    Result,
    check,
)
from benchmarks.models.configurations import LAYOUTS, Unbuilt, configuration

#: Bytes of address space that one family may take beyond what the walk itself has.
_MEMORY = 12 << 30


@dataclass
class Verdict:
    """All cases of one layout of one family in one word.

    `error`: the worst; `cases`: those that ran, by name; `oracle`: why it cannot serve the model, where it cannot.
    """

    verdict: str
    error: float | None = None
    why: str = ""
    oracle: str = ""
    cases: dict[str, str] = field(default_factory=dict)


def walk(
    chosen: Iterable[str], *, cases: tuple[Case, ...], jobs: int, limit: float
) -> Iterator[tuple[str, dict[str, Verdict]]]:
    """Verdicts by layout of every family, as they are done; a family over `limit` seconds keeps what it had."""
    waiting, running = deque(chosen), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            run = _Run.start(waiting.popleft(), cases, limit)
            running[run.results] = run
        patience = min(run.until for run in running.values()) - time.monotonic()
        for connection in wait(list(running), max(0.0, patience)):
            running[connection].take()
        for connection, run in list(running.items()):
            if run.over():
                del running[connection]
                yield run.family, {layout: fold(found) for layout, found in run.found.items()}


def fold(results: list[Result]) -> Verdict:
    """One verdict; exact where it could run is "exact", with what else there is beside it."""
    failing = next((r.why for r in results if r.case == "oracle"), "")
    results = [r for r in results if r.case != "oracle"]
    verdicts = {r.verdict for r in results}
    worst = next(v for v in ORDER if v in verdicts)
    if EXACT in verdicts <= {EXACT, REFUSED, UNBUILT, NO_ORACLE}:
        worst = EXACT
    errors = [r.error for r in results if r.error is not None]
    why = next((r.why for v in ORDER for r in results if r.verdict == v and r.why), "")
    ran = {r.case: f"{r.verdict} {r.error:.0e} {r.where}" if r.error is not None else r.verdict for r in results}
    alike = len(verdicts) == 1 and not errors
    return Verdict(worst, max(errors, default=None), why, failing, {} if alike else ran)


@dataclass(eq=False)
class _Run:
    """A family's process and what it has told."""

    family: str
    process: BaseProcess
    results: Connection
    limit: float
    until: float
    found: dict[str, list[Result]] = field(default_factory=dict)
    done: bool = False

    @classmethod
    def start(cls, family: str, cases: tuple[Case, ...], limit: float) -> _Run:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(family, cases, theirs), daemon=True)
        process.start()
        theirs.close()
        return cls(family, process, ours, limit, time.monotonic() + limit)

    def take(self) -> None:
        """One more result, or the end."""
        try:
            layout, result = self.results.recv()
        except EOFError:
            self.process.join()
            self._end(CRASH, f"the process ended with code {self.process.exitcode}")
            return
        if layout is None:
            self.done = True
        else:
            self.found.setdefault(layout, []).extend([result] if result else [])

    def over(self) -> bool:
        if not self.done and time.monotonic() >= self.until:
            self._end(UNFINISHED, f"not done after {self.limit:g} seconds")
        if self.done:
            self.process.kill()
            self.process.join()
        return self.done

    def _end(self, verdict: str, why: str) -> None:
        self.done = True
        layout = list(self.found)[-1] if self.found else LAYOUTS[-1]
        self.found.setdefault(layout, []).append(Result("", verdict, why=why))


def _run(family: str, cases: tuple[Case, ...], results: Connection) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
    for layout in layouts(family):
        # What ends the process from here on is this layout's.
        results.send((layout, None))
        for result in check(family, layout, cases):
            results.send((layout, result))
    results.send((None, None))


def layouts(family: str) -> tuple[str, ...]:
    """Both, or only the family's own where that attends to everything already."""
    try:
        full, own = (configuration(family, layout).to_dict() for layout in LAYOUTS)
    except Unbuilt:
        return LAYOUTS[-1:]
    return LAYOUTS if full != own else LAYOUTS[-1:]
