"""Which backend runs an operator: the `auto` table, explicit requests, and why one is refused.

A backend says itself, by `refusal(need)`, what it cannot serve, and `functions(operator)` is a namespace of the
operator's functions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from diffmas_ops import flash_engines, native, reference, triton_device
from diffmas_ops.errors import UnsupportedError
from diffmas_ops.need import Need
from diffmas_ops.scores import Scores

#: "flash" is multi-token attention through flash-attention packages; for everything else it means `auto`.
BACKENDS: dict[str, Any] = {
    "reference": reference,
    "cpu": native.CPU,
    "cuda": native.CUDA,
    "triton": triton_device,
    "flash": flash_engines,
}

#: Per device type, the backends `auto` tries in order: for what is bound by memory, and for the work of
#: multi-token calls in `cached_attention` (the flush of deferred rows included), which is bound by matmul.
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
AUTO_MANY = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


def refusal(backend: str, need: Need) -> str | None:
    """Why `backend` cannot serve `need`, or None where it can."""
    return BACKENDS[backend].refusal(need)


@lru_cache(maxsize=256)
def resolve(backend: str, need: Need) -> str:
    """Name of the backend that will run: the request itself, or the first of `AUTO` that can serve.

    Raises `ValueError` for an unknown name and `UnsupportedError` where an explicit request cannot be served.
    """
    if backend == "auto" or (backend == "flash" and not need.many):
        for name in (AUTO_MANY if need.many else AUTO).get(need.device, ("reference",)):
            if refusal(name, need) is None:
                return name
    if backend not in BACKENDS:
        allowed = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"backend is {backend!r}; allowed: {allowed}")
    if (reason := refusal(backend, need)) is not None:
        raise UnsupportedError(f"backend {backend!r} cannot run {need.operator}: {reason}")
    return backend


# Asked for every layer of every latent step: one look-up where it was asked before.
@lru_cache(maxsize=1024)
def _functions(operator: str, device: str, dtype: torch.dtype, backend: str, many: bool, scores: Scores | None) -> Any:
    need = Need(operator, device, dtype, many, () if scores is None else scores.asked)
    return BACKENDS[resolve(backend, need)].functions(operator)


def functions(
    operator: str, like: torch.Tensor, backend: str = "auto", *, many: bool = False, scores: Scores | None = None
) -> Any:
    """Namespace of `operator`'s functions for tensors of the device and dtype of `like`.

    `many`: for a multi-token call of `cached_attention`, or its deferred rows together; `scores`: of its queries.
    """
    return _functions(operator, like.device.type, like.dtype, backend, many, scores)
