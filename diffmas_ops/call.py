"""One forward over new tokens of a trace's rows: which tokens, in which columns, and what its backward must know."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffmas_ops.rows import RowRanges
from diffmas_ops.scores import Scores
from diffmas_ops.states import State

if TYPE_CHECKING:
    from diffmas_ops.trace import KVTrace


_GONE = "the trace of this call is gone; keep it alive until the forward is done"


def _check_rerun(layer: int, recorded: bool) -> None:
    if torch._C._current_graph_task_id() == -1:
        raise RuntimeError(
            f"layer {layer} of this call runs a second time outside a backward; allowed: once, a trace's layer keeps "
            "what one module writes"
        )
    if torch.is_grad_enabled() and not recorded:
        raise RuntimeError(
            f"layer {layer} of this call first ran without gradients and is now re-run with them; "
            "activation checkpointing must be non-reentrant (use_reentrant=False)"
        )


class Streak:
    """Calls of at most one token a row that follow each other; `starts`, int32 `[batch]`: the first one's columns."""

    def __init__(self, starts: Tensor):
        self.starts = starts


class Outputs:
    """The new tokens of a call whose results are wanted: of every row one range, maybe empty.

    Attributes:
        index: int64 `[total]`, their places in the call's packed tokens.
        rows: as in :class:`Call`, for them alone.
        total: their number.
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
        self.total = len(index)
        packed = torch.tensor(offsets + [begin for begin, _ in ranges] + index, dtype=torch.int32)
        bounds, begins, index = packed.to(call.starts.device).split([len(offsets), len(counts), self.total])
        self.rows = RowRanges.packed(bounds, call.starts + begins, max(counts), call.rows.max_seqlen_k)
        self.index = index.long()


class Call:
    """One forward of a model over new tokens of every row; made by :meth:`KVTrace.open`.

    Attributes:
        lengths: new tokens per row, host integers.
        total: their sum.
        rows: where the packed tokens are, and in which columns.
        starts, ends: int32 `[batch]`, columns of the rows' first new token and of the one after their last.
        position_ids: int64 `[1, total]`.
        streak, slot: which streak of single-token calls it belongs to, and as which of them; `streak` is None for
            others.
        outputs: the tokens whose results are wanted, where that is not all; a model's last layer need not
            compute the others beyond their keys and values.
        attend: None, or `(q, k, v, layer, scores, sinks) -> (out, lse)` in the operator's place, for a call whose
            keys and values are not all in its own storage. Without gradient; sinks are added to what it returns.
        adapter: which of a model's adapters it runs with, and runs again with, by its name; "none": without any; None:
            those that are active.
    """

    attend: (
        Callable[[Tensor, Tensor | None, Tensor | None, int, Scores, Tensor | None], tuple[Tensor, Tensor]] | None
    ) = None

    adapter: str | None = None

    def __init__(
        self,
        trace: KVTrace,
        lengths: list[int],
        streak: Streak | None,
        slot: int,
        outputs: Sequence[tuple[int, int]] | None = None,
    ):
        self.storage, self.gradients, self.backend = trace.storage, trace.gradients, trace.backend
        self.lengths, self.streak, self.slot = lengths, streak, slot
        self.total = sum(lengths)
        host_starts = trace.host_lengths
        host_ends = self.host_ends = [start + n for start, n in zip(host_starts, lengths, strict=True)]
        if lengths == trace.one_each:
            cu_seqlens_q = trace.one_each_cu_seqlens_q
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
            cu_seqlens_q, self.starts, self.ends, position_ids = packed.to(trace.device).split(sizes)
            self.position_ids = position_ids.long().unsqueeze(0)
        self.rows = RowRanges.packed(cu_seqlens_q, self.starts, max(lengths), max(host_ends))
        self.outputs = None if outputs is None else Outputs(self, outputs)
        # A strong reference would close a cycle order -> token -> autograd node -> call -> order, which Python's
        # collector cannot see through.
        self._order, self._states = weakref.ref(trace.order), weakref.ref(trace.states)
        # Per layer, whether its first run recorded gradients; None where they were disabled.
        self._recorded: dict[int, bool | None] = {}
        # Per recurrent layer, the state it began with, and whether its first run recorded gradients.
        self._began: dict[int, tuple[State, bool]] = {}
        self._differentiated: set[int] = set()
        self.rehearsing = False

    @property
    def order_token(self) -> Tensor | None:
        """The order token as it stands; None where the trace is gone."""
        order = self._order()
        return None if order is None else order.token

    def enter(self, layer: int) -> Tensor:
        """The order token `layer` consumes; on a re-run (activation checkpointing) a stand-in for it.

        Raises `RuntimeError` for a second run outside a backward, which would write over the first one's columns, and
        where gradients are enabled in a re-run but were not in the first run: re-entrant checkpointing, under which
        the calls' backward order is lost.
        """
        if layer not in self._recorded:
            if (token := self.order_token) is None:
                raise RuntimeError(_GONE)
            return token
        recorded = self._recorded[layer]
        _check_rerun(layer, recorded is not None)
        # Checkpointing insists on a re-run that saves what the first run saved.
        return torch.zeros(0, device=self.starts.device, requires_grad=bool(recorded))

    def leave(self, layer: int, token: Tensor) -> None:
        """Advance the trace's order to `token`, unless this was a re-run."""
        if layer in self._recorded:
            return
        recorded = self._recorded[layer] = token.requires_grad if torch.is_grad_enabled() else None
        self._order().advance(token, self.host_ends if recorded else None)

    def remembered(self, layer: int) -> State:
        """What recurrent `layer` remembers before this call; on a re-run (activation checkpointing) the same.

        Raises `RuntimeError` as :meth:`enter`.
        """
        if layer in self._began:
            state, recorded = self._began[layer]
            _check_rerun(layer, recorded)
            return state
        if (states := self._states()) is None:
            raise RuntimeError(_GONE)
        return states.layers.get(layer, {})

    def remember(self, layer: int, before: State, after: State) -> None:
        """Recurrent `layer` goes on from `before` to `after`, unless this was a re-run."""
        if layer not in self._began:
            self._began[layer] = before, torch.is_grad_enabled()
            self._states().layers[layer] = after

    @contextlib.contextmanager
    def rehearse(self) -> Iterator[None]:
        """Within it, a backward of this call (of several tokens a row) may be repeated, with `retain_graph`.

        It gives the gradients of the call's `q, k, v` and leaves those of all keys and values as later calls left
        them: what the call owes to older columns is not added, what its tokens owe to each other is taken back.
        """
        if self.streak is not None:
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
