"""What this machine can do at best, measured now: bytes copied and multiplications a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_LAPS = 8


def measure_ceilings(device: torch.device | str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP a second of a matrix product in `dtype`, and bytes a second of a copy; well under a second on a GPU."""
    seconds = event_seconds if torch.device(device).type == "cuda" else host_seconds
    return matmul_rate(device, dtype, seconds), copy_rate(device, seconds)


def copy_rate(device: torch.device | str, seconds: Callable[[Callable[[], Any]], float]) -> float:
    """Bytes read and written a second by a device-to-device copy far larger than any cache.

    `seconds(run)` times one run.
    """
    size = (1 << 30) if torch.device(device).type == "cuda" else (96 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(generator=_generator(device))
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), seconds)


def matmul_rate(device: torch.device | str, dtype: torch.dtype, seconds: Callable[[Callable[[], Any]], float]) -> float:
    """FLOP a second of a square matrix product of random numbers (zeros run faster than any real data)."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    generator = _generator(device)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _fastest(lambda: torch.mm(left, right, out=out), seconds)


def host_seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def event_seconds(run: Callable[[], Any]) -> float:
    """By CUDA events."""
    torch.cuda.synchronize()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def _generator(device: torch.device | str) -> torch.Generator:
    # Its own, so that measuring leaves training's random numbers alone.
    return torch.Generator(device).manual_seed(0)


def _fastest(run: Callable[[], Any], seconds: Callable[[Callable[[], Any]], float]) -> float:
    for _ in range(2):
        seconds(run)
    return min(seconds(run) for _ in range(_LAPS))
