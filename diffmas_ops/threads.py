"""How the CPU's threads wait for each other; imported before torch, whose OpenMP reads its settings once, when loaded.

OpenMP's threads spin for milliseconds at the end of every parallel region. On a machine whose cores are taken they spin
for threads that cannot run, and everything is slower by an order of magnitude. So OpenMP, which PyTorch's own operators
use, is told to spin for half a millisecond at most, and the compiled operators have threads of their own
(csrc/cpu/parallel.cpp), which are helped by whatever thread runs and are not waited for.
"""

from __future__ import annotations

import os
import sys

CHOICES = ("own", "openmp")
#: Rounds of some 50 ns: longer than what lies between two parallel regions of a small model's layer.
_SPINS = "10000"


def settle() -> str:
    """Which threads the compiled operators run on: "own", or "openmp", as `DIFFMAS_THREADS` says where it is set.

    Otherwise their own, unless OpenMP's would spin beside them: where torch was imported before this package and the
    environment did not say how OpenMP waits, or `OMP_WAIT_POLICY` is active.

    Raises:
        ValueError: another value of `DIFFMAS_THREADS`.
    """
    choice = os.environ.get("DIFFMAS_THREADS")
    if choice not in (None, *CHOICES):
        raise ValueError(f"DIFFMAS_THREADS is {choice!r}; allowed: {', '.join(CHOICES)}, or unset")
    said = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    early = "torch" not in sys.modules
    if early and not said:
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    active = os.environ.get("OMP_WAIT_POLICY", "").lower() == "active"
    return choice or ("own" if (early or said) and not active else "openmp")


CHOSEN = settle()
