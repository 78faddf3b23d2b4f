"""The traces of the answers being decoded, and the attention of one new token of each.

A pool stands for a call (:class:`diffmas_ops.Call`) over one new token of every planned answer. A step is::

    pool.open()
    model.run(pool, input_ids=tokens)
    pool.close()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from diffmas_ops import KVTrace, backends, merge_states
from diffmas_ops.rows import RowRanges
from diffmas_ops.states import RecurrentStates, State


@dataclass(eq=False)
class Prompt:
    """A row that has read its last prompt: where its trace stands, and the logits `[vocab]` behind it.

    `waiting`: its samples that have not been admitted yet.
    """

    trace: KVTrace
    row: int
    logits: Tensor
    waiting: int


class Columns:
    """Rows of keys and values `[num_layers, rows, num_kv_heads, capacity, head_dim]`; both sides grow by doubling."""

    def __init__(self, like: KVTrace):
        self.keys, self.values = like.keys[:, :0, :, :0], like.values[:, :0, :, :0]
        self.lengths: list[int] = []
        self._free: list[int] = []

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, `[rows, num_kv_heads, capacity, head_dim]`."""
        return self.keys[index], self.values[index]

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


class _Ranges:
    """At most one packed token a row, as `rows`."""

    def __init__(self, columns: Columns, token_of: dict[int, int], starts: Sequence[int]):
        rows = columns.keys.shape[1]
        begin, count, column = ([0] * rows for _ in range(3))
        for row, token in token_of.items():
            begin[row], count[row], column[row] = token, 1, starts[row]
        packed = torch.tensor([begin, count, column], dtype=torch.int32).to(columns.keys.device)
        q_begin, self._count, stands = packed.unbind(0)
        self.rows = RowRanges(q_begin, q_begin + self._count, stands, 1, 1 + max(column))

    def advance(self) -> None:
        """To the next column."""
        rows = self.rows
        self.rows = rows._replace(starts=rows.starts + self._count, max_seqlen_k=rows.max_seqlen_k + 1)


class OwnTraces:
    """Every answer appends to a trace of its own: for one sample a row.

    Attributes:
        position_ids: int64 `[1, answers]` of the next tokens; this and what follows as in :class:`diffmas_ops.Call`.
    """

    streak, slot, outputs, attend = True, 0, None, None

    def __init__(self, like: KVTrace):
        self.storage, self.backend = Columns(like), like.backend
        self._order = torch.empty(0, device=like.device)
        # What recurrent layers remember of the planned answers, and of those that wait for a plan.
        self._slots: list[int] = []
        self._states = RecurrentStates()
        self._entered: list[tuple[list[int], RecurrentStates]] = []

    def admit(self, prompts: Sequence[Prompt]) -> list[int]:
        """Slots of answers that begin behind `prompts`."""
        slots = self._slots_for(prompts)
        for _, group in groupby(zip(slots, prompts, strict=True), key=lambda pair: id(pair[1].trace)):
            taken, entered = zip(*group, strict=True)
            self._entered.append((list(taken), entered[0].trace.states.select([p.row for p in entered])))
        return slots

    def _slots_for(self, prompts: Sequence[Prompt]) -> list[int]:
        return _take(self.storage, prompts)

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self.storage.leave(slot)

    def plan(self, slots: Sequence[int]) -> None:
        """From now on, one token of each of `slots` a step, packed in this order."""
        places = [*self._slots, *(slot for taken, _ in self._entered for slot in taken)]
        place = {slot: i for i, slot in enumerate(places)}
        joined = RecurrentStates.joined([self._states, *(states for _, states in self._entered)])
        self._states, self._entered = joined.select([place[slot] for slot in slots]), []
        self._slots, self.total, self.lengths = slots, len(slots), [1] * len(slots)
        self._ranges = _Ranges(self.storage, {slot: i for i, slot in enumerate(slots)}, self.storage.lengths)
        self.position_ids = torch.tensor([self._positions(slots)]).to(self.storage.keys.device)

    def _positions(self, slots: Sequence[int]) -> list[int]:
        return [self.storage.lengths[slot] for slot in slots]

    def open(self) -> None:
        """Make room for the next tokens."""
        self.rows = self._ranges.rows
        self.storage.reserve(self.rows.max_seqlen_k)

    def close(self) -> None:
        """The tokens have been read."""
        self._ranges.advance()
        self.position_ids += 1
        for slot in self._slots:
            self.storage.lengths[slot] += 1

    def enter(self, layer: int) -> Tensor:
        """Nothing is differentiated."""
        return self._order

    def leave(self, layer: int, order: Tensor) -> None:
        """See :meth:`enter`."""

    def remembered(self, layer: int) -> State:
        """What recurrent `layer` remembers of the planned answers."""
        return self._states.layers[layer]

    def remember(self, layer: int, before: State, after: State) -> None:
        """See :meth:`remembered`."""
        self._states.layers[layer] = after


class SharedTraces(OwnTraces):
    """The samples of a row share its trace as it was before them; each appends to a short one of its own.

    Attention over the two is merged by their log-sum-exps. Over the shared part, a row's samples are further query
    heads of its keys' heads, so that one pass over the keys and values serves all of them.
    """

    def __init__(self, like: KVTrace):
        super().__init__(like)
        self._shared, self._heads = Columns(like), like.num_kv_heads
        self._ops = backends.functions("cached_attention", like.keys, like.backend, many=False)
        self._row_of: dict[Prompt, int] = {}
        self._prompt_of: dict[int, Prompt] = {}

    def _slots_for(self, prompts: Sequence[Prompt]) -> list[int]:
        for prompt in prompts:
            prompt.waiting -= 1
        new = [p for p in dict.fromkeys(prompts) if p not in self._row_of]
        self._row_of.update(zip(new, _take(self._shared, new), strict=True))
        slots = [self.storage.enter() for _ in prompts]
        self._prompt_of.update(zip(slots, prompts, strict=True))
        return slots

    def release(self, slot: int) -> None:
        """See :meth:`OwnTraces.release`; a shared trace goes with its last sample."""
        super().release(slot)
        prompt = self._prompt_of.pop(slot)
        if prompt.waiting == 0 and prompt not in self._prompt_of.values():
            self._shared.leave(self._row_of.pop(prompt))

    def plan(self, slots: Sequence[int]) -> None:
        """See :meth:`OwnTraces.plan`."""
        super().plan(slots)
        rows = [self._row_of[self._prompt_of[slot]] for slot in slots]
        token_of = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        self._prefix = _Ranges(self._shared, token_of, [n - 1 for n in self._shared.lengths])
        # Which of its row's blocks of heads each answer is.
        taken, heads = dict.fromkeys(token_of, 0), []
        for row in rows:
            heads.append(taken[row])
            taken[row] += 1
        self._grid = len(token_of), max(taken.values())
        at = [token_of[row] * self._grid[1] + head for row, head in zip(rows, heads, strict=True)]
        whole = at == list(range(self._grid[0] * self._grid[1]))
        self._at = None if whole else torch.tensor(at).to(self.storage.keys.device)

    def _positions(self, slots: Sequence[int]) -> list[int]:
        prefixes = (self._shared.lengths[self._row_of[self._prompt_of[slot]]] for slot in slots)
        return [n + self.storage.lengths[slot] for n, slot in zip(prefixes, slots, strict=True)]

    def attend(self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: int, scale: float) -> tuple[Tensor, Tensor]:
        """Append `k, v [answers, num_kv_heads, D]` where given, attend with `q [answers, num_heads, D]`."""
        own = self._attend(self.storage, self.rows, q, k, v, layer, scale)
        shared = self._attend(self._shared, self._prefix.rows, self._pack(q), None, None, layer, scale)
        outs, lses = (torch.stack((a, self._unpack(b))) for a, b in zip(own, shared, strict=True))
        return merge_states(outs, lses, backend=self.backend)

    def _attend(self, columns: Columns, rows, q, k, v, layer: int, scale: float) -> tuple[Tensor, Tensor]:
        keys, values = columns.keys[layer], columns.values[layer]
        return self._ops.cached_attention(q, k, v, keys, values, rows, scale)

    def _pack(self, q: Tensor) -> Tensor:
        """`[answers, heads, D]` to `[rows, kv_heads · samples · group, D]`."""
        rows, samples = self._grid
        if self._at is not None:
            q = q.new_zeros(rows * samples, *q.shape[1:]).index_copy_(0, self._at, q)
        return q.unflatten(0, (rows, samples)).unflatten(2, (self._heads, -1)).transpose(1, 2).flatten(1, 3)

    def _unpack(self, x: Tensor) -> Tensor:
        """`[rows, kv_heads · samples · group, …]` to `[answers, heads, …]`."""
        x = x.unflatten(1, (self._heads, self._grid[1], -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        return x if self._at is None else x[self._at]


def _take(columns: Columns, prompts: Sequence[Prompt]) -> list[int]:
    """Rows that hold the traces of `prompts`; the first batch of them is taken over whole, without a copy."""
    trace = prompts[0].trace if prompts else None
    if not columns.lengths and trace and [p.row for p in prompts if p.trace is trace] == list(range(trace.batch)):
        return columns.adopt(trace) + [columns.copy(p.trace, p.row) for p in prompts[trace.batch :]]
    return [columns.copy(p.trace, p.row) for p in prompts]
