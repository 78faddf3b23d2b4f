"""The compiled implementations, one for each kind of device."""

from __future__ import annotations

import torch

from diffmas_ops import library
from diffmas_ops.dtypes import SUPPORTED
from diffmas_ops.need import OPERATORS, Need


class Compiled:
    """What the library for `device` ("cpu", "cuda") serves."""

    def __init__(self, device: str):
        self.device = device

    def refusal(self, need: Need) -> str | None:
        """Why it cannot serve, or None where it can."""
        if need.device != self.device:
            return f"it runs on {self.device} tensors only, not on {need.device}"
        if (reason := library.failure(self.device)) is not None:
            return reason
        if need.dtype not in SUPPORTED:
            return f"it has no {need.dtype} kernels"
        missing = [f for f in OPERATORS[need.operator] if not library.has_kernel(f, self.device)]
        return f"no {self.device} kernel is registered for {', '.join(missing)}" if missing else None

    def functions(self, operator: str):
        return torch.ops.diffmas


CPU, CUDA = Compiled("cpu"), Compiled("cuda")
