"""One measurement: contenders on the same inputs, checked against the exact result first, then raced."""

from __future__ import annotations

import gc
from collections.abc import Callable
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
    #: Further columns of the result, taken in a run of its own.
    extra: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Experiment:
    """Contenders by name; a text in a contender's place says why it cannot run.

    Attributes:
        ours: the contender that speed-ups are of.
        implementations: contenders whose error is checked, `ours` included.
        plain: plain PyTorch in the same dtype, most welcome first; the first that runs is the yardstick.
        exact: the result in float64, or in the best precision there is.
        factor: errors up to this many times plain PyTorch's pass.
        tolerance: instead of `factor`, an absolute bound on the relative error.
    """

    operator: str
    direction: str
    case: Case
    work: Work
    contenders: dict[str, Contender | str]
    ours: str
    implementations: tuple[str, ...]
    plain: tuple[str, ...]
    exact: Callable[[], tuple[Tensor, ...]]
    factor: float = 2.0
    tolerance: float | None = None
    device: str = "cpu"
    outputs: tuple[str, ...] = ()


def measure(experiment: Experiment, *, seconds: float, clock: Clock, pedantic: Callable = repeat) -> dict[str, Any]:
    """Check, then time for about `seconds`; returns the record that goes into results files.

    Raises:
        WrongResult: nothing is timed then.
    """
    errors, reasons = _errors(experiment)
    allowed = _check(experiment, errors, reasons)
    racing = {n: c for n, c in experiment.contenders.items() if n in errors and c.timed}
    order = sorted(racing, key=lambda name: name != experiment.ours)
    timings = race({n: (racing[n].prepare, racing[n].run) for n in order}, clock, seconds=seconds, pedantic=pedantic)
    rows = []
    for name, contender in experiment.contenders.items():
        row: dict[str, Any] = {"name": name}
        if name in reasons:
            row["unavailable"] = reasons[name]
        else:
            row["errors"] = dict(zip(experiment.outputs, errors[name], strict=True))
        if name in timings:
            row |= asdict(timings[name]) | contender.extra()
            row["peak_bytes"] = peak_bytes(contender.run, contender.prepare(), experiment.device)
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


def _errors(experiment: Experiment) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Errors of every output of the contenders that ran, and why the others did not."""
    exact = experiment.exact()
    errors, reasons = {}, {}
    for name, contender in experiment.contenders.items():
        if isinstance(contender, str):
            reasons[name] = contender
            continue
        try:
            result = contender.read(contender.run(contender.prepare()))
            errors[name] = [relative_error(a, e) for a, e in zip(result, exact, strict=True)]
        except (RuntimeError, ImportError, ValueError, TypeError, AssertionError) as error:
            if name in experiment.implementations:
                raise
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        else:
            if name not in experiment.implementations and max(errors[name]) > _OTHER_RESULT:
                reasons[name] = f"wrong result: relative error {max(errors.pop(name)):.1e}"
        result = None
        gc.collect()
        if experiment.device == "cuda":
            torch.cuda.empty_cache()
    return errors, reasons


def _check(experiment: Experiment, errors: dict[str, list[float]], reasons: dict[str, str]) -> list[float]:
    if experiment.tolerance is not None:
        allowed = [experiment.tolerance] * len(experiment.outputs)
    else:
        plain = next((name for name in experiment.plain if name in errors), None)
        if plain is None:
            raise WrongResult(f"no plain PyTorch to compare with: {[reasons[n] for n in experiment.plain]}")
        allowed = [experiment.factor * error for error in errors[plain]]
    for name in experiment.implementations:
        for output, error, most in zip(experiment.outputs, errors[name], allowed, strict=True):
            if error > most:
                where = f"{experiment.operator} {experiment.direction}, {experiment.case.label}"
                raise WrongResult(f"{where}: error of {output} by {name} is {error:.2e}; allowed: {most:.2e}")
    return allowed
