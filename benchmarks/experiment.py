"""One measurement: contenders on the same inputs, raced, and checked against the exact result."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Work
from benchmarks.timing import Clock, peak_bytes, race, repeat

#: A contender further off than this computes something else (a mask aligned the other way, say).
_OTHER_RESULT = 0.1


class WrongResult(AssertionError):
    """An implementation of ours whose result is further from the exact one than plain PyTorch's allows."""


@dataclass(frozen=True)
class Contender:
    """`read(run(prepare()))` is the result to check, a tuple of tensors; only `run` is timed.

    `timed` False: measured for its error alone, because it computes more than is asked for.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    read: Callable[[Any], tuple[Tensor, ...]] = tuple
    timed: bool = True
    #: Entered around the run whose memory is recorded; yields a record that is complete on leaving it.
    watch: Callable[[], AbstractContextManager[dict[str, int]]] = lambda: nullcontext({})


@dataclass(frozen=True)
class Experiment:
    """Contenders by name; a text in a contender's place says why it cannot run.

    Attributes:
        ours: the contender that speed-ups are of.
        implementations: contenders whose error is checked, `ours` included.
        plain: plain PyTorch in the same dtype, most welcome first; the first that runs is the yardstick.
        exact: the result in float64, or in the best precision there is; a name: that contender's own result.
        factor: errors up to this many times plain PyTorch's pass.
        floor: errors up to this pass, however small plain PyTorch's.
        tolerance: instead of both, an absolute bound on the relative error.
    """

    operator: str
    direction: str
    case: Case
    work: Work
    contenders: dict[str, Contender | str]
    ours: str
    implementations: tuple[str, ...]
    plain: tuple[str, ...]
    exact: Callable[[], tuple[Tensor, ...]] | str
    factor: float = 2.0
    floor: float = 0.0
    tolerance: float | None = None
    device: str = "cpu"
    outputs: tuple[str, ...] = ()


def measure(experiment: Experiment, *, seconds: float, clock: Clock, pedantic: Callable = repeat) -> dict[str, Any]:
    """Time for about `seconds`, and check; returns the record that goes into results files.

    Timed first: float64 and the memory's record leave an allocator in pieces that cost every later run time.

    Raises:
        WrongResult: the times are dropped then.
    """
    runs = _run_all(experiment)
    racing = [n for n, c in experiment.contenders.items() if runs[n].result is not None and c.timed]
    racing.sort(key=lambda name: name != experiment.ours)
    timings = race(
        {n: (experiment.contenders[n].prepare, experiment.contenders[n].run) for n in racing}, clock,
        seconds=seconds, round_seconds=sum(runs[n].seconds for n in racing), pedantic=pedantic,
    )  # fmt: skip
    allowed = _check(experiment, runs)
    rows = []
    for name, one in runs.items():
        row: dict[str, Any] = {"name": name}
        if one.errors is None:
            row["unavailable"] = one.reason
        else:
            row["errors"] = dict(zip(experiment.outputs, one.errors, strict=True))
            if name in timings:
                row |= asdict(timings[name]) | _memory(experiment, name)
        rows.append(row)
    return {
        "operator": experiment.operator,
        "direction": experiment.direction,
        "case": asdict(experiment.case),
        "label": experiment.case.label,
        **asdict(experiment.work),
        "ours": experiment.ours,
        "implementations": experiment.implementations,
        "allowed_error": dict(zip(experiment.outputs, allowed, strict=True)),
        "contenders": rows,
    }


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """`‖actual - exact‖ / ‖exact‖` in float64; infinite where something is not finite."""
    actual, exact = actual.detach().double(), exact.double()
    if actual.shape != exact.shape:
        raise ValueError(f"actual has shape {tuple(actual.shape)}; allowed: {tuple(exact.shape)}")
    if not actual.isfinite().all():
        return float("inf")
    difference = float((actual - exact).norm())
    return difference / float(exact.norm()) if difference else 0.0


@dataclass
class _Run:
    """What became of a contender: its result, and the errors of that; or the reason why it is out."""

    result: tuple[Tensor, ...] | None = None
    errors: list[float] | None = None
    reason: str = ""
    seconds: float = 0.0


def _run_all(experiment: Experiment) -> dict[str, _Run]:
    """Every contender once."""
    runs = {name: _Run() for name in experiment.contenders}
    for name, contender in experiment.contenders.items():
        if isinstance(contender, str):
            runs[name].reason = contender
            continue
        try:
            begin = time.perf_counter()
            output = contender.run(contender.prepare())
            runs[name].result = contender.read(output)
            runs[name].seconds = time.perf_counter() - begin
            del output
        except (RuntimeError, ImportError, ValueError, TypeError, AssertionError) as error:
            if name in experiment.implementations:
                raise
            runs[name].reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:200]}"
        _release(experiment)
    return runs


def _memory(experiment: Experiment, name: str) -> dict[str, int]:
    contender = experiment.contenders[name]
    state = contender.prepare()
    with contender.watch() as seen:
        _, peak = peak_bytes(contender.run, state, experiment.device)
    _release(experiment)
    return {"peak_bytes": peak, **seen}


def _release(experiment: Experiment) -> None:
    gc.collect()
    if experiment.device == "cuda":
        torch.cuda.empty_cache()


def _check(experiment: Experiment, runs: dict[str, _Run]) -> list[float]:
    """Fill in the errors; returns the largest that are allowed."""
    exact = runs[experiment.exact].result if isinstance(experiment.exact, str) else experiment.exact()
    for name, one in runs.items():
        if one.result is None:
            continue
        errors = [relative_error(a, e) for a, e in zip(one.result, exact, strict=True)]
        if name not in experiment.implementations and max(errors) > _OTHER_RESULT:
            one.reason = f"wrong result: relative error {max(errors):.1e}"
        else:
            one.errors = errors
    if experiment.tolerance is not None:
        allowed = [experiment.tolerance] * len(experiment.outputs)
    else:
        plain = next((name for name in experiment.plain if runs[name].errors is not None), None)
        if plain is None:
            raise WrongResult(f"no plain PyTorch to compare with: {[runs[n].reason for n in experiment.plain]}")
        allowed = [max(experiment.floor, experiment.factor * error) for error in runs[plain].errors]
    for name in experiment.implementations:
        for output, error, most in zip(experiment.outputs, runs[name].errors, allowed, strict=True):
            if not error <= most:
                where = f"{experiment.operator} {experiment.direction}, {experiment.case.label}"
                raise WrongResult(f"{where}: error of {output} by {name} is {error:.2e}; allowed: {most:.2e}")
    return allowed
