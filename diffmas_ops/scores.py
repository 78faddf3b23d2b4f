"""How scores are made, and which of them count, for the backends in PyTorch.

Triton's is in cached_attention/triton_scores.py, C++'s in mask.h.
"""

from __future__ import annotations

import math
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """`softcap · tanh(softmax_scale · q kᵀ / softcap)`, where a query sees a column: its own and those before it.

    Attributes:
        window: of these a query sees the last so many, its own included; None: all.
        softcap: what scores stay below; None: they are taken as they are.
        chunk: a query at position p sees no column before `p // chunk * chunk`; None: no such border.
    """

    softmax_scale: float
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of what a backend may lack."""
        return tuple(name for name in ("window", "softcap", "chunk") if getattr(self, name) is not None)

    @property
    def local(self) -> bool:
        """Whether a query may not see all columns before it."""
        return self.window is not None or self.chunk is not None

    def check(self) -> Scores:
        """Itself; raises `ValueError` where a field is out of range, `TypeError` where columns are no integers."""
        for name, unit in (("window", "columns a query sees, its own included"), ("chunk", "columns of a chunk")):
            if (size := getattr(self, name)) is not None and index(size) < 1:
                raise ValueError(f"{name} is {size}; allowed: integers ≥ 1, {unit}; or None")
        if self.softcap is not None and not (0 < self.softcap < math.inf):
            raise ValueError(f"softcap is {self.softcap}; allowed: finite numbers above 0, or None")
        return self

    def first_seen(self, position: int) -> int:
        """The first column that a query at `position` sees."""
        of_window = 0 if self.window is None else position + 1 - self.window
        of_chunk = 0 if self.chunk is None else position // self.chunk * self.chunk
        return max(0, of_window, of_chunk)

    def reach(self, count: int, columns: int) -> int:
        """At most so many of `columns` columns are seen by `count` queries that stand side by side."""
        bounds = [size - 1 + count for size in (self.window, self.chunk) if size is not None]
        return min([columns, *bounds])

    def sees(self, positions: Tensor, columns: Tensor) -> Tensor:
        """Whether queries see columns, element by element."""
        seen = columns <= positions
        if self.window is not None:
            seen &= positions - columns < self.window
        if self.chunk is not None:
            seen &= columns >= positions // self.chunk * self.chunk
        return seen

    def cap(self, scaled: Tensor) -> Tensor:
        """Scores of scaled products."""
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def slope(self, scores: Tensor) -> Tensor | float:
        """Derivative of scores by scaled products."""
        return 1.0 if self.softcap is None else 1.0 - (scores / self.softcap).square()
