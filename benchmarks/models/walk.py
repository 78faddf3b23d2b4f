"""Families one by one, each in a process of its own with a time limit, so that nothing ends the walk."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
import transformers

from benchmarks.models.comparison import CRASH, EXACT, REFUSED, UNBUILT, NO_ORACLE, WRONG, Result, check
from benchmarks.models.configurations import LAYOUTS, Unbuilt, configuration

#: Bytes of address space that one family may take beyond what the walk itself has.
_MEMORY = 12 << 30
#: What a layout is called after, from the worst.
_ORDER = (WRONG, CRASH, NO_ORACLE, UNBUILT, REFUSED, EXACT)


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


def walk(chosen: Iterable[str], *, jobs: int, limit: float) -> Iterator[tuple[str, dict[str, Verdict]]]:
    """Verdicts by layout of every family, as they are done; a family over `limit` seconds keeps what it had."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_guarded, family, limit): family for family in chosen}
        for future in as_completed(futures):
            yield futures[future], {layout: fold(found) for layout, found in future.result().items()}


def fold(results: list[Result]) -> Verdict:
    """One verdict; partly refused and exact otherwise is "exact", with what is refused beside it."""
    failing = next((r.why for r in results if r.case == "oracle"), "")
    results = [r for r in results if r.case != "oracle"]
    verdicts = {r.verdict for r in results}
    worst = next(v for v in _ORDER if v in verdicts)
    if verdicts == {EXACT, REFUSED}:
        worst = EXACT
    errors = [r.error for r in results if r.error is not None]
    why = next((r.why for v in (worst, REFUSED) for r in results if r.verdict == v and r.why), "")
    ran = {r.case: f"{r.verdict} {r.error:.0e} {r.where}" if r.error is not None else r.verdict for r in results}
    alike = len(verdicts) == 1 and not errors
    return Verdict(worst, max(errors, default=None), why, failing, {} if alike else ran)


def _guarded(family: str, limit: float) -> dict[str, list[Result]]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(family, theirs), daemon=True)
    process.start()
    theirs.close()
    found: dict[str, list[Result]] = {}
    ended, until = "", time.monotonic() + limit
    while True:
        if not ours.poll(max(0.0, until - time.monotonic())):
            ended = f"not done after {limit:g} seconds"
            break
        try:
            layout, result = ours.recv()
        except EOFError:
            process.join()
            ended = f"the process ended with code {process.exitcode}"
            break
        if layout is None:
            break
        found.setdefault(layout, []).append(result)
    process.kill()
    process.join()
    if ended:
        found.setdefault(list(found)[-1] if found else LAYOUTS[-1], []).append(Result("", CRASH, why=ended))
    return found


def _run(family: str, results: Connection) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
    for layout in layouts(family):
        for result in check(family, layout):
            results.send((layout, result))
    results.send((None, None))


def layouts(family: str) -> tuple[str, ...]:
    """Both, or only the family's own where that attends to everything already."""
    try:
        full, own = (configuration(family, layout).to_dict() for layout in LAYOUTS)
    except Unbuilt:
        return LAYOUTS[-1:]
    return LAYOUTS if full != own else LAYOUTS[-1:]
