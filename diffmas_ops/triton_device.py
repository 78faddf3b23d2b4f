"""The Triton backend: where its kernels can run, and on which device; importing this does not import Triton."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType

import torch

from diffmas_ops.need import Need

#: Options of every launch: multiply-adds round once (Triton's own default differs from version to version).
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

#: Stands in for the number of multiprocessors under the interpreter, so that keys are split there as well.
_INTERPRETED_MULTIPROCESSORS = 4


def refusal(need: Need) -> str | None:
    """Why Triton kernels cannot serve, or None where they can."""
    if importlib.util.find_spec(f"diffmas_ops.{need.operator}.triton") is None:
        return f"there is no Triton kernel for {need.operator}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if need.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no {need.dtype} kernels"
    from triton import knobs

    if knobs.runtime.interpret:
        return "Triton's interpreter multiplies bfloat16 wrongly" if need.dtype == torch.bfloat16 else None
    if need.device != "cuda":
        return (
            f"{need.device} tensors need Triton's interpreter (environment variable TRITON_INTERPRET=1 from the start)"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def functions(operator: str) -> ModuleType:
    return importlib.import_module(f"diffmas_ops.{operator}.triton")


def launch_on(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> int:
    """Compute capability times ten (90 for sm_90), 0 under the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
