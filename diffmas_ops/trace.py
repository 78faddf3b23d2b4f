"""The append-only key/value trace of a batch of rows, and the calls that write it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from operator import index

import torch
from torch import Tensor

from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.gradients import TraceGradients


class CapacityError(ValueError):
    """A call needs more columns than its trace has."""


class TraceStorage:
    """The buffers of a trace: `keys, values [num_layers, batch, num_kv_heads, capacity, head_dim]`."""

    def __init__(self, keys: Tensor, values: Tensor):
        self._replace(keys, values)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, `[batch, num_kv_heads, capacity, head_dim]`."""
        return self._layers[index]

    def new_accumulators(self) -> tuple[Tensor, Tensor]:
        """Zeros of the shape of `keys` and `values`, in which their gradients add up."""
        acc = accumulation_dtype(self.keys.dtype)
        return tuple(torch.zeros(self.keys.shape, dtype=acc, device=self.keys.device) for _ in range(2))

    def grow(self, capacity: int) -> None:
        """Move to buffers of `capacity` columns."""
        grown = []
        for old in (self.keys, self.values):
            grown.append(old.new_empty(*old.shape[:3], capacity, old.shape[4]))
            grown[-1][:, :, :, : old.shape[3]] = old
        self._replace(*grown)

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        # Views made once: a latent step's layer asks for them forward and backward.
        self._layers = tuple(zip(keys.unbind(0), values.unbind(0), strict=True))


class Outputs:
    """The new tokens of a call whose results are wanted: of every row one range, maybe empty.

    Attributes:
        index: int64 `[total]`, their places in the call's packed tokens.
        q_begin, q_end, starts: int32 `[batch]`, as in :class:`Call`, for them alone.
        total, max_new: their number, and the most of one row.
    """

    def __init__(self, call: Call, ranges: Sequence[tuple[int, int]]):
        counts = [end - begin for begin, end in ranges]
        valid = len(ranges) == len(call.lengths) and all(
            0 <= begin <= end <= n for (begin, end), n in zip(ranges, call.lengths, strict=True)
        )
        if not valid or sum(counts) == 0:
            raise ValueError(
                f"outputs is {list(ranges)}; allowed: a range (begin, end) within each row's new tokens, "
                f"{call.lengths}, not all of them empty"
            )
        offsets, index, at = [0], [], 0
        for (begin, end), n in zip(ranges, call.lengths, strict=True):
            offsets.append(offsets[-1] + end - begin)
            index.extend(range(at + begin, at + end))
            at += n
        self.total, self.max_new = len(index), max(counts)
        packed = torch.tensor(offsets + [begin for begin, _ in ranges] + index, dtype=torch.int32)
        bounds, begins, index = packed.to(call.starts.device).split([len(offsets), len(counts), self.total])
        self.q_begin, self.q_end, self.starts = bounds[:-1], bounds[1:], call.starts + begins
        self.index = index.long()


class Call:
    """One forward of a model over new tokens of every row; made by :meth:`KVTrace.open`.

    Tokens are packed: row b's are `q_begin[b] … q_end[b] - 1` of `total`, and token `q_begin[b] + i` is at
    position (trace column) `starts[b] + i`.

    Attributes:
        lengths: new tokens per row, host integers.
        total, max_new, max_kv: their sum, their maximum, and the longest row after the call.
        cu_seqlens: int32 `[batch + 1]`; `q_begin` and `q_end` are views of it.
        starts, ends: int32 `[batch]`, columns of the rows' first new token and of the one after their last.
        position_ids: int64 `[1, total]`.
        run, slot: calls of at most one token a row that follow each other share a `run` and count up its
            `slot`; `run` is None for other calls.
        outputs: the tokens whose results are wanted, where that is not all; a model's last layer need not
            compute the others beyond their keys and values.
        attend: None, or `(q, k, v, layer, scale) -> (out, lse)` in the operator's place, for a call whose keys and
            values are not all in its own storage. Without gradient.
    """

    attend = None

    def __init__(
        self,
        trace: KVTrace,
        lengths: list[int],
        run: int | None,
        slot: int,
        outputs: Sequence[tuple[int, int]] | None = None,
    ):
        self.storage, self.gradients, self.implementation = trace.storage, trace.gradients, trace.implementation
        self.lengths, self.run, self.slot = lengths, run, slot
        self.total, self.max_new = sum(lengths), max(lengths)
        host_starts = trace.host_lengths
        host_ends = self.host_ends = [start + n for start, n in zip(host_starts, lengths, strict=True)]
        self.max_kv = max(host_ends)
        if lengths == trace.one_each:
            self.cu_seqlens = trace.one_each_cu_seqlens
            self.starts, self.ends = trace.lengths, trace.lengths + 1
            self.position_ids = self.starts.long().unsqueeze(0)
        else:
            offsets, positions = [0], []
            for start, end in zip(host_starts, host_ends, strict=True):
                offsets.append(offsets[-1] + end - start)
                positions.extend(range(start, end))
            # One transfer for everything the call needs on the device.
            packed = torch.tensor(offsets + host_starts + host_ends + positions, dtype=torch.int32)
            sizes = [len(offsets), trace.batch, trace.batch, self.total]
            self.cu_seqlens, self.starts, self.ends, position_ids = packed.to(trace.device).split(sizes)
            self.position_ids = position_ids.long().unsqueeze(0)
        self.q_begin, self.q_end = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        self.outputs = None if outputs is None else Outputs(self, outputs)
        # A strong reference would close a cycle trace -> order token -> autograd node -> call -> trace, which
        # Python's collector cannot see through.
        self._trace = weakref.ref(trace)
        # Per layer, whether its first run recorded gradients; None where they were disabled.
        self._recorded: dict[int, bool | None] = {}
        self._differentiated: set[int] = set()
        self.rehearsing = False

    @property
    def order(self) -> Tensor | None:
        """The trace's order token as it stands; None where the trace is gone."""
        trace = self._trace()
        return None if trace is None else trace.order

    def enter(self, layer: int) -> Tensor:
        """The order token `layer` consumes; on a re-run (activation checkpointing) a stand-in for it.

        Raises `RuntimeError` where gradients are enabled in a re-run but were not in the first run: re-entrant
        checkpointing, under which the calls' backward order is lost.
        """
        if layer not in self._recorded:
            if (trace := self._trace()) is None:
                raise RuntimeError("the trace of this call is gone; keep it alive until the forward is done")
            return trace.order
        recorded = self._recorded[layer]
        if torch.is_grad_enabled() and recorded is None:
            raise RuntimeError(
                f"layer {layer} of this call first ran without gradients and is now re-run with them; "
                "activation checkpointing must be non-reentrant (use_reentrant=False)"
            )
        # Checkpointing insists on a re-run that saves what the first run saved.
        return torch.zeros(0, device=self.starts.device, requires_grad=bool(recorded))

    def leave(self, layer: int, order: Tensor) -> None:
        """Advance the trace's order token to `order`, unless this was a re-run."""
        if layer in self._recorded:
            return
        recorded = self._recorded[layer] = order.requires_grad if torch.is_grad_enabled() else None
        trace = self._trace()
        trace.order = order
        if recorded:
            trace.differentiable = self.host_ends

    @contextlib.contextmanager
    def rehearse(self) -> Iterator[None]:
        """Within it, a backward of this call (of several tokens a row) may be repeated, with `retain_graph`.

        It gives the gradients of the call's `q, k, v` and leaves those of all keys and values as later calls left
        them: what the call owes to older columns is not added, what its tokens owe to each other is taken back.
        """
        if self.run is not None:
            raise ValueError(f"lengths is {self.lengths}; allowed: a call with more than one token in some row")
        self.rehearsing = True
        try:
            yield
        finally:
            self.rehearsing = False

    def claim_backward(self, layer: int) -> None:
        """Raise `RuntimeError` the second time `layer` of this call is differentiated."""
        if layer in self._differentiated:
            raise RuntimeError(
                "a trace can be differentiated once: its gradient accumulators are consumed. "
                "Add the losses before calling backward, or run the forward again"
            )
        self._differentiated.add(layer)


class KVTrace:
    """Keys and values of all tokens a batch of rows has written so far, per layer; append-only.

    Keys are stored after RoPE; a token's position is its column. Gradients flow from every call to all
    columns earlier calls wrote (DiffMAS, arXiv 2604.21794), without saving keys or values per call.

    Attributes:
        lengths: int32 `[batch]` on the device, columns in use; `host_lengths` mirrors it for planning.
        order: empty tensor that threads the calls, so that autograd differentiates them last to first.
        differentiable: columns a row up to the last one of a call that recorded gradients, host integers.
    """

    def __init__(self, storage: TraceStorage, lengths: list[int], *, grow: bool, implementation: str):
        self.storage, self.implementation, self._grow = storage, implementation, grow
        self.num_layers, self.batch, self.num_kv_heads, _, self.head_dim = storage.keys.shape
        self.device, self.dtype = storage.keys.device, storage.keys.dtype
        self.host_lengths = lengths
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        self.one_each = [1] * self.batch
        self.one_each_cu_seqlens = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
        self._runs = 0
        self.differentiable = [0] * self.batch
        self.detach_()

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        grow: bool = False,
        implementation: str = "auto",
    ) -> KVTrace:
        """An empty trace of `capacity` columns a row.

        Args:
            grow: double the capacity when a call does not fit, instead of raising :class:`CapacityError`.
            implementation: "auto", or the operators' implementation to insist on.

        Raises:
            ValueError: a size that is not a positive integer.
            TypeError: an unsupported dtype.
        """
        sizes = dict(
            num_layers=num_layers, batch=batch, num_kv_heads=num_kv_heads, capacity=capacity, head_dim=head_dim
        )
        for name, size in sizes.items():
            if index(size) < 1:
                raise ValueError(f"{name} is {size}; allowed: integers ≥ 1")
        accumulation_dtype(dtype)
        shape = (num_layers, batch, num_kv_heads, capacity, head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(TraceStorage(keys, values), [0] * batch, grow=grow, implementation=implementation)

    @property
    def keys(self) -> Tensor:
        """`[num_layers, batch, num_kv_heads, capacity, head_dim]`; columns from `lengths` on are undefined."""
        return self.storage.keys

    @property
    def values(self) -> Tensor:
        """Like :attr:`keys`."""
        return self.storage.values

    @property
    def capacity(self) -> int:
        return self.storage.keys.shape[3]

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
            self._runs += 1
        self._slot = (0 if self._slot is None else self._slot + 1) if single else None
        call = Call(self, lengths, self._runs if single else None, self._slot or 0, outputs)
        self.host_lengths, self.lengths = ends, call.ends
        return call

    def skip(self, count: int) -> int:
        """Reserve the next `count` columns of every row for single-token calls that are made elsewhere, on the same
        buffers. Returns the run they are; whoever makes them advances `order` and defers their rows.

        Raises:
            CapacityError: as :meth:`open`.
        """
        self.host_lengths, self.lengths = self._reserve([count] * self.batch), self.lengths + count
        self._runs, self._slot = self._runs + 1, None
        return self._runs

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
                attended to: its backward reads them.
        """
        lengths = [index(n) for n in lengths]
        bounds = list(zip(self.differentiable, self.host_lengths, strict=True))
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
        storage = TraceStorage(self.keys.detach()[:, at], self.values.detach()[:, at])
        lengths = [self.host_lengths[row] for row in rows]
        return KVTrace(storage, lengths, grow=self._grow, implementation=self.implementation)

    def detach_(self) -> KVTrace:
        """Cut the gradient: columns written so far take none from calls opened from now on."""
        self.order = torch.zeros(0, device=self.device)
        self.gradients = TraceGradients(self.storage, self.lengths, self.implementation)
        self._slot: int | None = None
        return self
