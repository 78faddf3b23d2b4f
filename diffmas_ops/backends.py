"""Which implementation runs an operator: the `auto` table, explicit requests, and why one is refused.

An implementation is a namespace holding the operator functions under their `torch.ops.diffmas` names and signatures.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch

from diffmas_ops import library

#: Functions of each operator, by the folder that holds them.
OPERATORS = {
    "kv_append": ("kv_append", "kv_gather"),
    "kv_concat": ("kv_concat", "kv_concat_backward"),
    "latent_project": ("latent_project", "latent_project_backward"),
    "cached_attention": (
        "cached_attention",
        "cached_attention_backward_queries",
        "cached_attention_backward_columns",
        "cached_attention_backward_token",
    ),
    "merge_states": ("merge_states",),
}

#: Per device type, the implementations `auto` tries in order.
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")}

IMPLEMENTATIONS = ("reference", "cpu", "cuda")

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class UnsupportedError(ValueError):
    """An explicitly requested implementation cannot serve the call; the message says why."""


def refusal(implementation: str, operator: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `implementation` cannot run `operator` on `device` ("cpu", "cuda") in `dtype`, or None where it can."""
    if implementation == "reference":
        return None
    if device != implementation:
        return f"it runs on {implementation} tensors only, not on {device}"
    if (reason := library.failure(implementation)) is not None:
        return reason
    if dtype not in _NATIVE_DTYPES:
        return f"it has no {dtype} kernels"
    missing = [f for f in OPERATORS[operator] if not library.has_kernel(f, implementation)]
    return f"no {implementation} kernel is registered for {', '.join(missing)}" if missing else None


@lru_cache(maxsize=256)
def resolve(operator: str, implementation: str, device: str, dtype: torch.dtype) -> str:
    """Name of the implementation that will run: the request itself, or the first of `AUTO` that can serve.

    Raises `ValueError` for an unknown name and `UnsupportedError` where an explicit request cannot be served.
    """
    if implementation == "auto":
        for name in AUTO.get(device, ("reference",)):
            if refusal(name, operator, device, dtype) is None:
                return name
    if implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r}; allowed: {allowed}")
    if (reason := refusal(implementation, operator, device, dtype)) is not None:
        raise UnsupportedError(f"implementation {implementation!r} cannot run {operator}: {reason}")
    return implementation


@lru_cache(maxsize=256)
def _functions(operator: str, implementation: str, device: str, dtype: torch.dtype) -> Any:
    name = resolve(operator, implementation, device, dtype)
    if name in ("cpu", "cuda"):
        return torch.ops.diffmas
    return importlib.import_module(f"diffmas_ops.{operator}.{name}")


def functions(operator: str, like: torch.Tensor, implementation: str = "auto") -> Any:
    """Namespace of `operator`'s functions for tensors of the device and dtype of `like`."""
    return _functions(operator, implementation, like.device.type, like.dtype)
