"""Loads the compiled libraries and remembers why one could not be loaded; importing never fails for want of one."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path

import torch

from diffmas_ops import threads


def _load(name: str) -> str | None:
    path = Path(__file__).parent / f"libdiffmas_{name}.so"
    if not path.is_file():
        return f"{path.name} was not built into {path.parent}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path.name} could not be loaded: {error}"
    return None


def _load_all() -> dict[str, str | None]:
    failures = {"cpu": _load("cpu")}
    # The CPU library defines the operators that the CUDA library implements.
    if failures["cpu"] is not None:
        failures["cuda"] = failures["cpu"]
    elif not torch.cuda.is_available():
        failures["cuda"] = "torch.cuda.is_available() is False"
    else:
        failures["cuda"] = _load("cuda")
    return failures


_FAILURES = _load_all()


def failure(device: str) -> str | None:
    """Why the library for `device` ("cpu" or "cuda") is not there, or None where it is loaded."""
    return _FAILURES[device]


@lru_cache(maxsize=64)
def has_kernel(function: str, device: str) -> bool:
    """Whether `torch.ops.diffmas.<function>` has a kernel for `device` ("cpu" or "cuda").

    A library built from older sources defines fewer operators than there are.
    """
    defined = hasattr(torch.ops.diffmas, function)
    return defined and torch._C._dispatch_has_kernel_for_dispatch_key(f"diffmas::{function}", device.upper())


if failure("cpu") is None:
    torch.ops.diffmas.use_own_threads(threads.CHOSEN == "own")
    # The operators are defined now; their fake implementations can be registered.
    importlib.import_module("diffmas_ops.fake")
