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

if TYPE_CHECKING:
    from diffmas_ops.call import Call, Outputs
    from diffmas_ops.storage import TraceStorage

# A position behind every column, so that a deferred row is never masked.
_BEHIND_ALL = 2**30


class _Pending:
    """Deferred rows of one run of single-token calls at one layer; a slot never written contributes exactly 0."""

    def __init__(self, call: Call, q: Tensor, scale: float):
        batch, slots, heads, head_dim = len(call.lengths), call.slot + 1, q.shape[1], q.shape[2]
        acc = accumulation_dtype(q.dtype)
        self.run, self.first, self.scale = call.run, slots, scale
        self.q, self.grad = (q.new_zeros(batch, slots, heads, head_dim) for _ in range(2))
        self.lse = torch.full((batch, slots, heads), torch.inf, dtype=acc, device=q.device)
        self.delta = torch.zeros_like(self.lse)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.grad, self.lse, self.delta

    def takes(self, call: Call, q: Tensor, scale: float) -> bool:
        """Whether the rows of `call` can be added by the same dense pass."""
        return (self.run, self.scale, self.q.shape[2]) == (call.run, scale, q.shape[1])

    def ranges(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(q_begin, q_end, starts)` of the filled slots in the flattened `[batch * slots]` token dimension."""
        batch, slots = self.lse.shape[:2]
        ends = torch.arange(slots, (batch + 1) * slots, slots, dtype=torch.int32, device=self.q.device)
        return ends - (slots - self.first), ends, torch.full_like(ends, _BEHIND_ALL)


class TraceGradients:
    """Accumulators and deferred rows of the calls opened on a trace since its gradient was last cut.

    `frozen`, int32 `[batch]`: columns before it take no gradient.
    """

    def __init__(self, storage: TraceStorage, frozen: Tensor, implementation: str):
        self._storage, self._implementation, self.frozen = storage, implementation, frozen
        self._pending: dict[int, _Pending] = {}
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []  # views of both

    def accumulators(self) -> tuple[Tensor, Tensor]:
        """Gradients of all keys and values, `[num_layers, batch, num_kv_heads, capacity, head_dim]`."""
        if self._keys is None:
            self._keys, self._values = self._storage.new_accumulators()
        return self._keys, self._values

    def backward(
        self,
        call: Call,
        layer: int,
        grad_out: Tensor,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        outputs: Outputs | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a call's packed `q, k, v` at `layer`, given that of its output.

        `outputs`: q, out, lse and the gradient of out are of these tokens of the call only.
        """
        if call.rehearsing:
            return self._rehearse(call, layer, grad_out, q, out, lse, scale, outputs or call)
        call.claim_backward(layer)
        if call.run is None or outputs is not None:
            return self._backward_many(call, layer, grad_out, q, out, lse, scale, outputs or call)
        return self._backward_token(call, layer, grad_out, q, out, lse, scale)

    def flush_all(self, column_end: Tensor, max_kv: int) -> None:
        """:meth:`flush` every layer."""
        for layer in list(self._pending):
            self.flush(layer, column_end, max_kv)

    def deferred(self) -> dict[int, _Pending]:
        """The deferred rows of every layer, whose tensors later calls of the same run still write."""
        return dict(self._pending)

    def defer(self, rows: dict[int, _Pending], run: int) -> None:
        """Take over rows that another object has deferred, over the same columns, as those of `run`.

        Raises `RuntimeError` where there are deferred rows already: they are to be flushed first.
        """
        if self._pending:
            raise RuntimeError(f"layers {list(self._pending)} have deferred rows; flush them first")
        for layer, pending in rows.items():
            pending.run = run
            self._pending[layer] = pending

    def flush(self, layer: int, column_end: Tensor, max_kv: int) -> None:
        """Add the deferred rows of `layer` to the columns before `column_end`, int32 `[batch]`."""
        if (pending := self._pending.pop(layer, None)) is None:
            return
        keys, values, grad_keys, grad_values = self._layer(layer)
        q_begin, q_end, starts = pending.ranges()
        ops = backends.functions("cached_attention", pending.q, self._implementation, many=True)
        ops.cached_attention_backward_columns(
            pending.grad.flatten(0, 1), pending.q.flatten(0, 1), pending.lse.flatten(0, 1),
            pending.delta.flatten(0, 1), keys, values, grad_keys, grad_values, q_begin, q_end, starts,
            self.frozen, column_end, pending.q.shape[1] - pending.first, max_kv, pending.scale,
        )  # fmt: skip

    def _rehearse(self, call, layer, grad_out, q, out, lse, scale, queries):
        """`_backward_many` without a trace of it: only the call's own columns are added to, and then set back."""
        # The flush is what later calls owe, and stays.
        self.flush(layer, call.ends, call.max_kv)
        _, _, grad_keys, grad_values = self._layer(layer)
        rows = (call.q_begin, call.q_end, call.starts)
        moves = backends.functions("kv_append", grad_keys, self._implementation)
        before = moves.kv_gather(grad_keys, grad_values, *rows, call.max_new, call.total, grad_keys.dtype)
        grads = self._backward_many(call, layer, grad_out, q, out, lse, scale, queries, column_begin=call.starts)
        moves.kv_append(*before, grad_keys, grad_values, *rows, call.max_new)
        return grads

    def _backward_many(self, call, layer, grad_out, q, out, lse, scale, queries, column_begin=None):
        self.flush(layer, call.ends, call.max_kv)
        keys, values, grad_keys, grad_values = self._layer(layer)
        rows = (queries.q_begin, queries.q_end, queries.starts)
        ops = backends.functions("cached_attention", q, self._implementation, many=True)
        columns = (self.frozen if column_begin is None else column_begin, call.ends)
        grad_q = ops.cached_attention_backward(
            grad_out, q, out, lse, keys, values, grad_keys, grad_values, *rows, *columns,
            queries.max_new, call.max_kv, scale,
        )  # fmt: skip
        gather = backends.functions("kv_append", grad_keys, self._implementation).kv_gather
        own = (call.q_begin, call.q_end, call.starts)
        return grad_q, *gather(grad_keys, grad_values, *own, call.max_new, call.total, q.dtype)

    def _backward_token(self, call, layer, grad_out, q, out, lse, scale):
        pending = self._pending.get(layer)
        if pending is not None and not pending.takes(call, q, scale):
            self.flush(layer, call.ends, call.max_kv)
            pending = None
        if pending is None:
            pending = self._pending[layer] = _Pending(call, q, scale)
        pending.first = call.slot
        ops = backends.functions("cached_attention", q, self._implementation)
        return ops.cached_attention_backward_token(
            grad_out, q, out, lse, *self._layer(layer), pending.q, pending.grad, pending.lse, pending.delta,
            call.slot, call.q_begin, call.q_end, call.starts, call.max_kv, scale,
        )  # fmt: skip

    def _layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grads = self.accumulators()
        if not self._layers:
            self._layers = list(zip(*(x.unbind(0) for x in grads), strict=True))
        return *self._storage.layer(layer), *self._layers[layer]
