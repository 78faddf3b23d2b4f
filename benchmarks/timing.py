"""Time and memory of functions measured against each other: one lap of each, in turn, many times over.

On a shared machine a disturbance then hits all of them alike, so that ratios of medians hold where times do not.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from diffmas.training.memory import measure

# Twice what a small processor has of a last cache; and what a GPU reads for longer than its host takes to queue an
# operator's launches.
_FLUSH_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}
MIN_ROUNDS, MAX_ROUNDS = 3, 50


@dataclass(frozen=True)
class Timing:
    """Median and quartiles, in seconds."""

    median_s: float
    low_s: float
    high_s: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return cls(statistics.median(samples), low, high, len(samples))


class Clock:
    """Times one run on a device after a flush of its caches: by CUDA events, or by the processor's clock.

    On a GPU the flush only reads: lines that it had written would be written back at the expense of what is timed. It
    also keeps the GPU busy while the host queues the timed launches, so that a short kernel is not charged for the
    host's time.
    """

    def __init__(self, device: str):
        kind = torch.device(device).type
        self.cuda = kind == "cuda"
        self._flush = torch.zeros(_FLUSH_BYTES[kind] // 4, device=device)

    def seconds(self, run: Callable[[Any], Any], state: Any) -> float:
        """Seconds of `run(state)`; freeing its result is not timed."""
        if not self.cuda:
            self._flush.zero_()
            begin = time.perf_counter()
            result = run(state)
            end = time.perf_counter()
            del result
            return end - begin
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()
        start.record()
        run(state)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3


def repeat(target: Callable, *, setup: Callable, rounds: int) -> None:
    """Stand-in for pytest-benchmark's `pedantic` where there is no pytest."""
    for _ in range(rounds):
        arguments, _ = setup()
        target(*arguments)


def race(
    contenders: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]],
    clock: Clock,
    *,
    seconds: float,
    round_seconds: float,
    pedantic: Callable = repeat,
) -> dict[str, Timing]:
    """Time `run(prepare())` of every contender `(prepare, run)`, interleaved, for about `seconds` in all.

    Args:
        contenders: already run once; `prepare` is not timed.
        round_seconds: what one lap of each takes, roughly.
        pedantic: pytest-benchmark's, which then also keeps the time of the first contender.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    first, *others = contenders

    def lap(name: str) -> None:
        prepare, run = contenders[name]
        samples[name].append(clock.seconds(run, prepare()))

    def setup():
        for name in others:
            lap(name)
        return (contenders[first][0](),), {}

    def target(state):
        samples[first].append(clock.seconds(contenders[first][1], state))

    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / round_seconds)))
    gc.collect()
    gc.disable()
    try:
        pedantic(target, setup=setup, rounds=rounds)
    finally:
        gc.enable()
    return {name: Timing.of(laps) for name, laps in samples.items()}


def peak_bytes(run: Callable[[Any], Any], state: Any, device: str) -> tuple[Any, int]:
    """`run(state)`, and the most memory it held at once beyond what was held before it, in bytes."""
    result, _, peak = measure(lambda: run(state), device)
    return result, peak
