"""What this machine can do at best, measured now with the benchmarks' clock."""

from __future__ import annotations

import torch

from benchmarks.timing import Clock
from diffmas.training.ceilings import copy_rate, matmul_rate


def measure(device: str, dtypes: list[str]) -> dict[str, float]:
    """`copy` in bytes a second, and one entry a dtype in FLOP a second."""
    clock = Clock(device)

    def seconds(run) -> float:
        return clock.seconds(lambda _: run(), None)

    rates = {name: matmul_rate(device, getattr(torch, name), seconds) for name in dtypes}
    return {"copy": copy_rate(device, seconds)} | rates
