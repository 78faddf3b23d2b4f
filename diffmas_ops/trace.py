"""The append-only key/value trace of a batch of rows."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from diffmas_ops.call import Call, Streak
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.errors import CapacityError
from diffmas_ops.gradients import TraceGradients
from diffmas_ops.order import Order
from diffmas_ops.states import RecurrentStates
from diffmas_ops.storage import Stack, TraceStorage


class KVTrace:
    """Keys and values of all tokens a batch of rows has written so far, per layer; append-only.

    Keys are stored after RoPE; a token's position is its column. Gradients flow from every call to all
    columns earlier calls wrote (DiffMAS, arXiv 2604.21794), without saving keys or values per call.

    Attributes:
        lengths: int32 `[batch]` on the device, columns in use; `host_lengths` mirrors it for planning.
        order: what makes autograd differentiate the calls last to first.
        states: what recurrent layers remember of the rows.
    """

    def __init__(self, storage: TraceStorage, lengths: list[int], *, grow: bool, backend: str):
        self.storage, self.backend, self._grow = storage, backend, grow
        self.num_layers, self.batch = storage.num_layers, storage.batch
        self.device, self.dtype = storage.device, storage.dtype
        self.host_lengths = lengths
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        self.one_each = [1] * self.batch
        self.one_each_cu_seqlens_q = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
        self.order, self.states = Order(self.batch, self.device), RecurrentStates()
        self.detach_()

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        batch: int,
        num_kv_heads: int | Sequence[int],
        capacity: int,
        head_dim: int | Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        grow: bool = False,
        backend: str = "auto",
    ) -> KVTrace:
        """An empty trace of `capacity` columns a row.

        Args:
            num_kv_heads, head_dim: of every layer, or one for each.
            grow: double the capacity when a call does not fit, instead of raising :class:`CapacityError`.
            backend: "auto", or the operators' backend to insist on.

        Raises:
            ValueError: a size that is not a positive integer, or not one size a layer.
            TypeError: an unsupported dtype.
        """
        for name, size in dict(num_layers=num_layers, batch=batch, capacity=capacity).items():
            if index(size) < 1:
                raise ValueError(f"{name} is {size}; allowed: integers ≥ 1")
        heads, dims = (
            _by_layer(name, size, num_layers) for name, size in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim))
        )
        accumulation_dtype(dtype)
        storage = TraceStorage.allocate(list(zip(heads, dims, strict=True)), batch, capacity, dtype, device)
        return cls(storage, [0] * batch, grow=grow, backend=backend)

    @property
    def keys(self) -> Tensor:
        """`[num_layers, batch, num_kv_heads, capacity, head_dim]`; columns from `lengths` on are undefined.

        Of a trace whose layers all have the same sizes; :meth:`TraceStorage.layer` has those of others.
        """
        (stack,) = self.storage.stacks
        return stack.keys

    @property
    def values(self) -> Tensor:
        """Like :attr:`keys`."""
        (stack,) = self.storage.stacks
        return stack.values

    @property
    def capacity(self) -> int:
        return self.storage.capacity

    def open(self, lengths: int | Sequence[int], outputs: Sequence[tuple[int, int]] | None = None) -> Call:
        """Reserve the next `lengths[b] ≥ 0` columns of every row b (an integer: of all rows) and plan a call.

        `outputs`: per row, the range of its new tokens whose results are wanted; None: all.

        Raises:
            TypeError: a length that is no integer.
            ValueError: not one length per row, a negative one, or no new token at all.
            CapacityError: a row would outgrow the capacity (and the trace was not allocated with `grow`).
        """
        given = lengths if isinstance(lengths, Sequence) else [lengths] * self.batch
        lengths = [index(n) for n in given]
        if len(lengths) != self.batch or min(lengths) < 0 or max(lengths) == 0:
            raise ValueError(
                f"lengths is {lengths}; allowed: {self.batch} integers ≥ 0 (one per row), not all of them 0"
            )
        ends = self._reserve(lengths)
        single = max(lengths) == 1
        if single and self._slot is None:
            self._streak = Streak(self.lengths)
        self._slot = (0 if self._slot is None else self._slot + 1) if single else None
        call = Call(self, lengths, self._streak if single else None, self._slot or 0, outputs)
        self.host_lengths, self.lengths = ends, call.ends
        return call

    def skip(self, count: int) -> Streak:
        """Reserve the next `count` columns of every row for single-token calls that are made elsewhere, on the same
        buffers. Returns the streak they are; whoever makes them advances `order` and defers their rows.

        Raises:
            CapacityError: as :meth:`open`.
        """
        streak, self._slot = Streak(self.lengths), None
        self.host_lengths, self.lengths = self._reserve([count] * self.batch), self.lengths + count
        return streak

    def _reserve(self, lengths: list[int]) -> list[int]:
        """The rows' lengths after `lengths` more columns each, for which there is room then."""
        ends = [start + n for start, n in zip(self.host_lengths, lengths, strict=True)]
        if (needed := max(ends)) > self.capacity:
            if not self._grow:
                raise CapacityError(
                    f"the call needs {needed} columns in row {ends.index(needed)}; capacity is {self.capacity}"
                )
            self.storage.grow(max(needed, 2 * self.capacity))
        return ends

    def rewind(self, lengths: Sequence[int]) -> None:
        """Give up the columns from `lengths[b]` on of every row b; the next call writes them anew.

        What is written then takes gradient, also where a gradient was cut behind the columns given up.

        Raises:
            ValueError: a length beyond the row's, or columns that a call with recorded gradients has written or
                attended to: its backward reads them; any at all where recurrent layers remember them.
        """
        lengths = [index(n) for n in lengths]
        lowest = self.host_lengths if self.states else self.order.differentiable
        bounds = list(zip(lowest, self.host_lengths, strict=True))
        if len(lengths) != self.batch or any(
            not low <= n <= high for n, (low, high) in zip(lengths, bounds, strict=True)
        ):
            allowed = ", ".join(f"{low} … {high}" for low, high in bounds)
            raise ValueError(f"lengths is {lengths}; allowed, row by row: {allowed}")
        self.host_lengths, self._slot = lengths, None
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        # No call since the cut has recorded gradients where this goes below it: none relies on the old bound.
        self.gradients.frozen = torch.minimum(self.gradients.frozen, self.lengths)

    def select_rows(self, rows: Sequence[int]) -> KVTrace:
        """A new trace, without gradient, whose row i is a copy of row `rows[i]`."""
        if not rows or min(rows) < 0 or max(rows) >= self.batch:
            raise ValueError(f"rows is {list(rows)}; allowed: at least one of 0 … {self.batch - 1}")
        at = torch.tensor(rows, device=self.device)
        stacks = [Stack(*(x.detach()[:, at] for x in stack)) for stack in self.storage.stacks]
        storage = TraceStorage(stacks)
        lengths = [self.host_lengths[row] for row in rows]
        selected = KVTrace(storage, lengths, grow=self._grow, backend=self.backend)
        selected.states = self.states.select(rows)
        return selected

    def detach_(self) -> KVTrace:
        """Cut the gradient: columns written so far take none from calls opened from now on."""
        self.order.cut()
        self.states.detach_()
        self.gradients = TraceGradients(self.storage, self.lengths, self.backend)
        self._slot: int | None = None
        return self


def _by_layer(name: str, size: int | Sequence[int], num_layers: int) -> list[int]:
    sizes = list(size) if isinstance(size, Sequence) else [size] * num_layers
    if len(sizes) != num_layers or min(map(index, sizes)) < 1:
        raise ValueError(f"{name} is {size}; allowed: an integer ≥ 1, or {num_layers} of them, one a layer")
    return sizes
