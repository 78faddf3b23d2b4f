"""Which implementation runs an operator: the `auto` table, explicit requests, and why one is refused.

An implementation is a namespace holding the operator functions under their `torch.ops.diffmas` names and signatures.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch

from diffmas_ops import library, triton_device

#: Functions of each operator, by the folder that holds them.
OPERATORS = {
    "kv_append": ("kv_append", "kv_gather"),
    "kv_concat": ("kv_concat", "kv_concat_backward"),
    "latent_project": ("latent_project", "latent_project_backward"),
    "few_rows_matmul": ("few_rows_matmul",),
    "decoder_layer": ("decoder_layer", "decoder_layer_backward_output", "decoder_layer_backward_input"),
    "cached_attention": (
        "cached_attention",
        "cached_attention_backward_queries",
        "cached_attention_backward_columns",
        "cached_attention_backward",
        "cached_attention_backward_token",
    ),
    "merge_states": ("merge_states",),
}

#: Per device type, the implementations `auto` tries in order: for what is bound by memory, and for the work of
#: multi-token calls in `cached_attention` (the flush of deferred rows included), which is bound by matmul.
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
AUTO_MANY = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

#: "flash" is multi-token attention through flash-attention packages; for everything else it means `auto`.
IMPLEMENTATIONS = ("reference", "cpu", "cuda", "triton", "flash")

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class UnsupportedError(ValueError):
    """An explicitly requested implementation cannot serve the call; the message says why."""


def refusal(implementation: str, operator: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `implementation` cannot run `operator` on `device` ("cpu", "cuda") in `dtype`, or None where it can."""
    if implementation == "reference":
        return None
    if implementation == "triton":
        if importlib.util.find_spec(f"diffmas_ops.{operator}.triton") is None:
            return f"there is no Triton kernel for {operator}"
        return triton_device.refusal(device, dtype)
    if implementation == "flash":
        from diffmas_ops.cached_attention import flash_engines

        return flash_engines.refusal(device, dtype)
    if device != implementation:
        return f"it runs on {implementation} tensors only, not on {device}"
    if (reason := library.failure(implementation)) is not None:
        return reason
    if dtype not in _NATIVE_DTYPES:
        return f"it has no {dtype} kernels"
    missing = [f for f in OPERATORS[operator] if not library.has_kernel(f, implementation)]
    return f"no {implementation} kernel is registered for {', '.join(missing)}" if missing else None


@lru_cache(maxsize=256)
def resolve(operator: str, implementation: str, device: str, dtype: torch.dtype, many: bool = False) -> str:
    """Name of the implementation that will run: the request itself, or the first of `AUTO` that can serve.

    `many`: it is for a multi-token call of `cached_attention`.

    Raises `ValueError` for an unknown name and `UnsupportedError` where an explicit request cannot be served.
    """
    if implementation == "auto" or (implementation == "flash" and not many):
        for name in (AUTO_MANY if many else AUTO).get(device, ("reference",)):
            if refusal(name, operator, device, dtype) is None:
                return name
    if implementation not in IMPLEMENTATIONS:
        allowed = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation is {implementation!r}; allowed: {allowed}")
    if (reason := refusal(implementation, operator, device, dtype)) is not None:
        raise UnsupportedError(f"implementation {implementation!r} cannot run {operator}: {reason}")
    return implementation


@lru_cache(maxsize=256)
def _functions(operator: str, implementation: str, device: str, dtype: torch.dtype, many: bool) -> Any:
    name = resolve(operator, implementation, device, dtype, many)
    if name in ("cpu", "cuda"):
        return torch.ops.diffmas
    return importlib.import_module(f"diffmas_ops.{operator}.{name}")


def functions(operator: str, like: torch.Tensor, implementation: str = "auto", *, many: bool = False) -> Any:
    """Namespace of `operator`'s functions for tensors of the device and dtype of `like`.

    `many`: for a multi-token call of `cached_attention`, or its deferred rows together.
    """
    return _functions(operator, implementation, like.device.type, like.dtype, many)
