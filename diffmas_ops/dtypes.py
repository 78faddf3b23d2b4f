"""Which dtype an operator computes and accumulates in."""

import torch

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for every other supported dtype."""
    if dtype not in SUPPORTED:
        raise TypeError(f"dtype is {dtype}; allowed: {', '.join(str(d) for d in SUPPORTED)}")
    return torch.float64 if dtype == torch.float64 else torch.float32
