"""What this machine can do at best, measured now: bytes copied and multiplications a second."""

from __future__ import annotations

import torch

from benchmarks.timing import Clock

_LAPS = 8


def _fastest(run, clock: Clock) -> float:
    for _ in range(2):
        clock.seconds(run, None)
    return min(clock.seconds(run, None) for _ in range(_LAPS))


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a device-to-device copy far larger than any cache."""
    size = (4 << 30) if torch.device(device).type == "cuda" else (96 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda _: target.copy_(source), Clock(device))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of a square matrix product of random numbers (zeros run faster than any real data)."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _fastest(lambda _: torch.mm(left, right, out=out), Clock(device))


def measure(device: str, dtypes: list[str]) -> dict[str, float]:
    """`copy` in bytes a second, and one entry a dtype in FLOP a second."""
    return {"copy": copy_rate(device)} | {name: matmul_rate(device, getattr(torch, name)) for name in dtypes}
