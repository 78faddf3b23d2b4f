"""Float64 all the way: what a model widens to float32 is widened to float64 instead, so that 1e-10 is in reach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class _Widened(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = tree_map(_wide, (args, kwargs or {})) if _names_float32(args, kwargs) else (args, kwargs or {})
        return func(*args, **kwargs)


def _names_float32(args, kwargs) -> bool:
    return torch.float32 in [a for a in args if isinstance(a, torch.dtype)] or (
        bool(kwargs) and torch.float32 in [a for a in kwargs.values() if isinstance(a, torch.dtype)]
    )


def _wide(value):
    return torch.float64 if value is torch.float32 else value


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """Within, float32 is float64: as a default, as a named dtype and in `.float()`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(before)
