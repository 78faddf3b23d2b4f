"""Gradient accumulators of a trace, and the backward of one call through them.

Calls are differentiated last to first. When a call's turn comes, every later call has added what it owes to the
call's columns, so the gradient of the call's own keys and values is read out of the accumulators.

A call of at most one token a row (a latent step) owes one query row to *all* older columns; adding it at once would
read and rewrite the accumulators for it. It is deferred: the rows of consecutive such calls pile up and one dense
pass adds them, when a call of more tokens (or the trace's origin) is reached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffmas_ops import backends
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.rows import ColumnRanges, Pending, RowRanges
from diffmas_ops.scores import Scores

if TYPE_CHECKING:
    from diffmas_ops.call import Call, Outputs, Streak
    from diffmas_ops.storage import Stack, TraceStorage


class Deferred:
    """The queries of one streak of single-token calls at one layer, which older columns still wait for."""

    def __init__(self, call: Call, q: Tensor, scores: Scores):
        batch, slots, heads, head_dim = len(call.lengths), call.slot + 1, q.shape[1], q.shape[2]
        acc = accumulation_dtype(q.dtype)
        self.streak, self.scores = call.streak, scores
        grad, lse = q.new_zeros(batch, slots, heads, head_dim), q.new_full((batch, slots, heads), torch.inf, dtype=acc)
        self.tensors = Pending(torch.zeros_like(grad), grad, lse, torch.zeros_like(lse), call.streak.starts)

    def takes(self, call: Call, q: Tensor, scores: Scores) -> bool:
        """Whether the queries of `call` can be added by the same dense pass."""
        return (self.streak, self.scores, self.tensors.q.shape[2]) == (call.streak, scores, q.shape[1])

    def rows(self, max_seqlen_k: int) -> RowRanges:
        """All slots in the flattened `[batch * slots]` token dimension, at their own positions."""
        batch, slots = self.tensors.lse.shape[:2]
        ends = torch.arange(slots, (batch + 1) * slots, slots, dtype=torch.int32, device=self.tensors.q.device)
        return RowRanges(ends - slots, ends, self.tensors.starts, slots, max_seqlen_k)


class TraceGradients:
    """Accumulators and deferred rows of the calls opened on a trace since its gradient was last cut.

    `frozen`, int32 `[batch]`: columns before it take no gradient.
    """

    def __init__(self, storage: TraceStorage, frozen: Tensor, backend: str):
        self._storage, self._backend, self.frozen = storage, backend, frozen
        self._pending: dict[int, Deferred] = {}
        self._stacks: list[Stack] = []
        self._layers: list[Stack] = []  # views of them

    def accumulators(self) -> list[Stack]:
        """Gradients of all keys and values, stacked as these are."""
        if not self._stacks:
            self._stacks = self._storage.new_accumulators()
        return self._stacks

    def backward(
        self,
        call: Call,
        layer: int,
        grad_out: Tensor,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        scores: Scores,
        *,
        outputs: Outputs | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a call's packed `q, k, v` at `layer`, given that of its output.

        `outputs`: q, out, lse and the gradient of out are of these tokens of the call only.
        """
        rows = (call if outputs is None else outputs).rows
        if call.rehearsing:
            return self._rehearse(call, layer, grad_out, q, out, lse, rows, scores)
        call.claim_backward(layer)
        if call.streak is None or outputs is not None:
            return self._backward_many(call, layer, grad_out, q, out, lse, rows, scores)
        return self._backward_token(call, layer, grad_out, q, out, lse, scores)

    def flush_all(self, column_end: Tensor, max_seqlen_k: int) -> None:
        """:meth:`flush` every layer."""
        for layer in list(self._pending):
            self.flush(layer, column_end, max_seqlen_k)

    def deferred(self) -> dict[int, Deferred]:
        """The deferred rows of every layer, whose tensors later calls of the same streak still write."""
        return dict(self._pending)

    def defer(self, rows: dict[int, Deferred], streak: Streak) -> None:
        """Take over rows that another object has deferred, over the same columns, as those of `streak`.

        Raises `RuntimeError` where there are deferred rows already: they are to be flushed first.
        """
        if self._pending:
            raise RuntimeError(f"layers {list(self._pending)} have deferred rows; flush them first")
        for layer, pending in rows.items():
            pending.streak = streak
            self._pending[layer] = pending

    def flush(self, layer: int, column_end: Tensor, max_seqlen_k: int) -> None:
        """Add the deferred rows of `layer` to the columns before `column_end`, int32 `[batch]`."""
        if (pending := self._pending.pop(layer, None)) is None:
            return
        keys, values, grad_keys, grad_values = self._layer(layer)
        q, grad, lse, delta, _ = pending.tensors
        ops = backends.functions("cached_attention", q, self._backend, many=True, scores=pending.scores)
        ops.cached_attention_backward_columns(
            grad.flatten(0, 1), q.flatten(0, 1), lse.flatten(0, 1), delta.flatten(0, 1), keys, values, grad_keys,
            grad_values, pending.rows(max_seqlen_k), ColumnRanges(self.frozen, column_end), pending.scores,
        )  # fmt: skip

    def _rehearse(self, call, layer, grad_out, q, out, lse, rows, scores):
        """`_backward_many` without a trace of it: only the call's own columns are added to, and then set back."""
        # The flush is what later calls owe, and stays.
        self.flush(layer, call.ends, call.rows.max_seqlen_k)
        _, _, grad_keys, grad_values = self._layer(layer)
        moves = backends.functions("kv_append", grad_keys, self._backend)
        before = moves.kv_gather(grad_keys, grad_values, call.rows, call.total, grad_keys.dtype)
        grads = self._backward_many(call, layer, grad_out, q, out, lse, rows, scores, column_begin=call.starts)
        moves.kv_append(*before, grad_keys, grad_values, call.rows)
        return grads

    def _backward_many(self, call, layer, grad_out, q, out, lse, rows, scores, column_begin=None):
        self.flush(layer, call.ends, call.rows.max_seqlen_k)
        keys, values, grad_keys, grad_values = self._layer(layer)
        ops = backends.functions("cached_attention", q, self._backend, many=True, scores=scores)
        columns = ColumnRanges(self.frozen if column_begin is None else column_begin, call.ends)
        grad_q = ops.cached_attention_backward(
            grad_out, q, out, lse, keys, values, grad_keys, grad_values, rows, columns, scores
        )
        gather = backends.functions("kv_append", grad_keys, self._backend).kv_gather
        return grad_q, *gather(grad_keys, grad_values, call.rows, call.total, q.dtype)

    def _backward_token(self, call, layer, grad_out, q, out, lse, scores):
        pending = self._pending.get(layer)
        if pending is not None and not pending.takes(call, q, scores):
            self.flush(layer, call.ends, call.rows.max_seqlen_k)
            pending = None
        if pending is None:
            pending = self._pending[layer] = Deferred(call, q, scores)
        ops = backends.functions("cached_attention", q, self._backend, scores=scores)
        return ops.cached_attention_backward_token(
            grad_out, q, out, lse, *self._layer(layer), pending.tensors, call.rows, scores
        )

    def _layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stacks = self.accumulators()
        if not self._layers:
            self._layers = [layer for stack in stacks for layer in stack.layers()]
        return *self._storage.layer(layer), *self._layers[layer]
