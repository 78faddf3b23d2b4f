"""The traces of the answers being decoded, and the attention of one new token of each.

A pool stands for a call (:class:`diffmas_ops.Call`) over one new token of every planned answer. A step is::

    pool.open()
    system.run(pool, input_ids=tokens)
    pool.close()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmas_ops import KVTrace, backends, merge_states


@dataclass(frozen=True, eq=False)
class Prompt:
    """A row that has read its last prompt: where its trace stands, and the logits `[vocab]` behind it."""

    trace: KVTrace
    row: int
    logits: Tensor


class Columns:
    """Rows of keys and values `[num_layers, rows, num_kv_heads, capacity, head_dim]`; both sides grow by doubling."""

    def __init__(self, like: KVTrace):
        self.keys, self.values = like.keys[:, :0, :, :0], like.values[:, :0, :, :0]
        self.lengths: list[int] = []
        self._free: list[int] = []

    def adopt(self, trace: KVTrace) -> list[int]:
        """Take over the buffers of `trace`; returns its rows."""
        self.keys, self.values, self.lengths = trace.keys, trace.values, list(trace.host_lengths)
        return list(range(trace.batch))

    def enter(self) -> int:
        """An empty row."""
        if not self._free:
            self._free.append(len(self.lengths))
            self.lengths.append(0)
            self.reserve(0)
        row = self._free.pop()
        self.lengths[row] = 0
        return row

    def leave(self, row: int) -> None:
        """Give `row` back."""
        self._free.append(row)

    def copy(self, trace: KVTrace, source: int) -> int:
        """A row that holds row `source` of `trace`."""
        row, length = self.enter(), trace.host_lengths[source]
        self.reserve(length)
        self.keys[:, row, :, :length] = trace.keys[:, source, :, :length]
        self.values[:, row, :, :length] = trace.values[:, source, :, :length]
        self.lengths[row] = length
        return row

    def reserve(self, capacity: int) -> None:
        """Room for all rows and for so many columns."""
        layers, rows, heads, columns, head_dim = self.keys.shape
        if len(self.lengths) <= rows and capacity <= columns:
            return
        more_rows = rows if len(self.lengths) <= rows else max(len(self.lengths), 2 * rows)
        more_columns = columns if capacity <= columns else max(capacity, 2 * columns)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(layers, more_rows, heads, more_columns, head_dim)
            new[:, :rows, :, :columns] = old
            setattr(self, name, new)


class _Tokens:
    """At most one packed token a row: `begin[b] … end[b] - 1` of them, in column `starts[b]`; int32 `[rows]`."""

    def __init__(self, columns: Columns, at: dict[int, int], starts: Sequence[int]):
        rows = columns.keys.shape[1]
        begin, count, column = ([0] * rows for _ in range(3))
        for row, token in at.items():
            begin[row], count[row], column[row] = token, 1, starts[row]
        packed = torch.tensor([begin, count, column], dtype=torch.int32).to(columns.keys.device)
        self.begin, self.count, self.starts = packed.unbind(0)
        self.end = self.begin + self.count
        self.max_kv = 1 + max(column)
        self._columns = columns

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: int, scale: float, ops):
        keys, values = self._columns.keys[layer], self._columns.values[layer]
        ranges = self.begin, self.end, self.starts
        return ops.cached_attention(q, k, v, keys, values, *ranges, 1, self.max_kv, scale)

    def advance(self) -> None:
        self.starts += self.count
        self.max_kv += 1


class OwnTraces:
    """Every answer appends to a trace of its own: for one sample a row.

    Attributes:
        position_ids: int64 `[1, answers]` of the next tokens.
    """

    max_new = 1

    def __init__(self, like: KVTrace):
        self.storage = Columns(like)
        self._ops = backends.functions("cached_attention", like.keys, like.implementation, many=False)

    def enter(self, prompts: Sequence[Prompt]) -> list[int]:
        """Slots of answers that begin behind `prompts`."""
        trace = prompts[0].trace
        if not self.storage.lengths and [p.row for p in prompts if p.trace is trace] == list(range(trace.batch)):
            return self.storage.adopt(trace) + [self.storage.copy(p.trace, p.row) for p in prompts[trace.batch :]]
        return [self.storage.copy(p.trace, p.row) for p in prompts]

    def leave(self, slot: int) -> None:
        """Give a slot back."""
        self.storage.leave(slot)

    def plan(self, slots: Sequence[int]) -> None:
        """From now on, one token of each of `slots` a step, packed in this order."""
        lengths, device = self.storage.lengths, self.storage.keys.device
        self._slots = slots
        self._tokens = _Tokens(self.storage, {slot: i for i, slot in enumerate(slots)}, lengths)
        self.position_ids = torch.tensor([[lengths[slot] for slot in slots]]).to(device)

    def open(self) -> None:
        """Room for the next tokens."""
        self.storage.reserve(self._tokens.max_kv)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """Append `k, v [answers, num_kv_heads, head_dim]` and attend with `q [answers, num_heads, head_dim]`."""
        return self._tokens.attend(q, k, v, layer, scale, self._ops)[0]

    def close(self) -> None:
        """The tokens have been read."""
        self._tokens.advance()
        self.position_ids += 1
        for slot in self._slots:
            self.storage.lengths[slot] += 1


class SharedTraces:
    """The samples of a row share its trace as it was before them; each appends to a short one of its own.

    Attention over the two is merged by their log-sum-exps. Over the shared part, a row's samples are further query
    heads of its keys' heads, so that one pass over the keys and values serves all of them.
    """

    max_new = 1

    def __init__(self, like: KVTrace):
        self.storage, self._shared = Columns(like), Columns(like)
        self._ops = backends.functions("cached_attention", like.keys, like.implementation, many=False)
        self._implementation = like.implementation
        self._row_of: dict[Prompt, int] = {}
        self._prompt_of: dict[int, Prompt] = {}

    def enter(self, prompts: Sequence[Prompt]) -> list[int]:
        """See :meth:`OwnTraces.enter`."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._row_of]
        trace = prompts[0].trace
        if not self._shared.lengths and [p.row for p in new if p.trace is trace] == list(range(trace.batch)):
            rows = self._shared.adopt(trace) + [self._shared.copy(p.trace, p.row) for p in new[trace.batch :]]
        else:
            rows = [self._shared.copy(p.trace, p.row) for p in new]
        self._row_of.update(zip(new, rows, strict=True))
        slots = [self.storage.enter() for _ in prompts]
        self._prompt_of.update(zip(slots, prompts, strict=True))
        return slots

    def leave(self, slot: int) -> None:
        """See :meth:`OwnTraces.leave`; a shared trace goes with its last sample."""
        self.storage.leave(slot)
        prompt = self._prompt_of.pop(slot)
        if prompt not in self._prompt_of.values():
            self._shared.leave(self._row_of.pop(prompt))

    def plan(self, slots: Sequence[int]) -> None:
        """See :meth:`OwnTraces.plan`."""
        lengths, device = self.storage.lengths, self.storage.keys.device
        self._slots = slots
        self._tokens = _Tokens(self.storage, {slot: i for i, slot in enumerate(slots)}, lengths)
        rows = [self._row_of[self._prompt_of[slot]] for slot in slots]
        prefixes = [self._shared.lengths[row] for row in rows]
        token_of = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        self._prefix = _Tokens(self._shared, token_of, [n - 1 for n in self._shared.lengths])
        # Answer i is head block `heads[i]` of its row's one packed token.
        heads, taken = [], dict.fromkeys(token_of, 0)
        for row in rows:
            heads.append(taken[row])
            taken[row] += 1
        self._grid = len(token_of), max(taken.values())
        at = [token_of[row] * self._grid[1] + head for row, head in zip(rows, heads, strict=True)]
        self._at = None if at == list(range(self._grid[0] * self._grid[1])) else torch.tensor(at).to(device)
        ends = [n + lengths[slot] for n, slot in zip(prefixes, slots, strict=True)]
        self.position_ids = torch.tensor([ends]).to(device)

    def open(self) -> None:
        """See :meth:`OwnTraces.open`."""
        self.storage.reserve(self._tokens.max_kv)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """See :meth:`OwnTraces.attend`."""
        own = self._tokens.attend(q, k, v, layer, scale, self._ops)
        shared = self._prefix.attend(self._pack(q, k.shape[1]), None, None, layer, scale, self._ops)
        states = [(a, self._unpack(b, k.shape[1])) for a, b in zip(own, shared, strict=True)]
        outs, lses = (torch.stack(pair) for pair in states)
        return merge_states(outs, lses, implementation=self._implementation)[0]

    def close(self) -> None:
        """See :meth:`OwnTraces.close`."""
        self._tokens.advance()
        self.position_ids += 1
        for slot in self._slots:
            self.storage.lengths[slot] += 1

    def _pack(self, q: Tensor, kv_heads: int) -> Tensor:
        """`[answers, heads, D]` to `[rows, kv_heads · samples · group, D]`."""
        rows, samples = self._grid
        if self._at is not None:
            q = q.new_zeros(rows * samples, *q.shape[1:]).index_copy_(0, self._at, q)
        return q.view(rows, samples, kv_heads, -1, q.shape[2]).transpose(1, 2).reshape(rows, -1, q.shape[2])

    def _unpack(self, x: Tensor, kv_heads: int) -> Tensor:
        """`[rows, kv_heads · samples · group, …]` to `[answers, heads, …]`."""
        rows, samples = self._grid
        x = x.unflatten(1, (kv_heads, samples, -1)).transpose(1, 2)
        x = x.reshape(rows * samples, -1, *x.shape[4:])
        return x if self._at is None else x[self._at]
