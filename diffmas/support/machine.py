"""The machine a measurement comes from, and the most memory this process used on it."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from diffmas.support.distributed import processes


def peak_memory_mb() -> float:
    """Most memory this process had at once: of the GPU where it used one, otherwise resident, in MB (10⁶ bytes)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1024 if sys.platform == "linux" else 1) / 1e6


def machine() -> dict[str, Any]:
    """What a measurement has to be read with: processor or GPU, threads, versions."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
