"""What a query sees of its row, for the backends in PyTorch; Triton's is in triton_mask.py, C++'s in mask.h."""

from __future__ import annotations

from torch import Tensor


def sees(positions: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a column: its own and those before it, of which the last `window` (its own included)."""
    seen = columns <= positions
    return seen if window is None else seen & (positions - columns < window)


def check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; allowed: integers ≥ 1, columns a query sees, its own included; or None")
