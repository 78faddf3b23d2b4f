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
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.rows import RowRanges
from diffmas_ops.scores import Scores
from diffmas_ops.states import RecurrentStates, State
from diffmas_ops.storage import Stack, TraceStorage


@dataclass(eq=False)
class Prompt:
    """A row that has read its last prompt: where its trace stands, and the logits `[vocab]` behind it.

    `waiting`: its samples that have not been admitted yet.
    """

    trace: KVTrace
    row: int
    logits: Tensor
    waiting: int


class Columns(TraceStorage):
    """Rows of keys and values, stacked as a trace's are; rows and columns grow by doubling."""

    def __init__(self, like: KVTrace):
        super().__init__([Stack(*(x[:, :0, :, :0] for x in stack)) for stack in like.storage.stacks])
        self.lengths: list[int] = []
        self._free: list[int] = []

    @property
    def rows(self) -> int:
        """How many there is room for."""
        return self.stacks[0].keys.shape[1]

    def adopt(self, trace: KVTrace) -> list[int]:
        """Take over the buffers of `trace`; returns its rows."""
        self._replace(trace.storage.stacks)
        self.lengths = list(trace.host_lengths)
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
        for own, other in zip(self.buffers(), trace.storage.buffers(), strict=True):
            own[:, row, :, :length] = other[:, source, :, :length]
        self.lengths[row] = length
        return row

    def reserve(self, capacity: int) -> None:
        """Room for all rows and for so many columns."""
        rows, columns = self.rows, self.capacity
        if len(self.lengths) <= rows and capacity <= columns:
            return
        more_rows = rows if len(self.lengths) <= rows else max(len(self.lengths), 2 * rows)
        more_columns = columns if capacity <= columns else max(capacity, 2 * columns)

        def grown(old: Tensor) -> Tensor:
            new = old.new_empty(old.shape[0], more_rows, old.shape[2], more_columns, old.shape[4])
            new[:, :rows, :, :columns] = old
            return new

        self._replace([Stack(*map(grown, stack)) for stack in self.stacks])


class _Ranges:
    """At most one packed token a row, as `rows`."""

    def __init__(self, columns: Columns, token_of: dict[int, int], starts: Sequence[int]):
        rows = columns.rows
        begin, count, column = ([0] * rows for _ in range(3))
        for row, token in token_of.items():
            begin[row], count[row], column[row] = token, 1, starts[row]
        packed = torch.tensor([begin, count, column], dtype=torch.int32).to(columns.device)
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
    adapter: str | None = None

    def __init__(self, like: KVTrace):
        self.storage, self.backend = Columns(like), like.backend
        self._order = torch.empty(0, device=like.device)
        # What recurrent layers remember of the planned answers, and of those that wait for a plan.
        self._slots: Sequence[int] = []
        self._states = RecurrentStates()
        self._entered: list[tuple[Sequence[int], RecurrentStates]] = []

    def admit(self, prompts: Sequence[Prompt]) -> list[int]:
        """Slots of answers that begin behind `prompts`."""
        slots = self._slots_for(prompts)
        for _, group in groupby(zip(slots, prompts, strict=True), key=lambda pair: id(pair[1].trace)):
            taken, entered = zip(*group, strict=True)
            self._entered.append((taken, entered[0].trace.states.select([p.row for p in entered])))
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
        self.position_ids = torch.tensor([self._positions(slots)]).to(self.storage.device)

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

    Attention over the two is merged by their log-sum-exps. A window or a chunk counts real positions: of either part,
    an answer sees its last so many columns, and answers that see as many go together.
    """

    def __init__(self, like: KVTrace):
        super().__init__(like)
        self._shared = Columns(like)
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
        self._rows = [self._row_of[self._prompt_of[slot]] for slot in slots]
        self._whole = _Together(self._shared, self._rows)

    def _positions(self, slots: Sequence[int]) -> list[int]:
        prefixes = (self._shared.lengths[self._row_of[self._prompt_of[slot]]] for slot in slots)
        return [n + self.storage.lengths[slot] for n, slot in zip(prefixes, slots, strict=True)]

    def open(self) -> None:
        """See :meth:`OwnTraces.open`."""
        super().open()
        self._parts: dict[Scores, tuple[list[tuple], list[tuple]]] = {}

    def attend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: int, scores: Scores, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append `k, v [answers, num_kv_heads, D]` where given, attend with `q [answers, num_heads, D]`."""
        if scores not in self._parts:
            self._parts[scores] = self._shared_parts(scores), self._own_parts(scores)
        of_shared, of_own = self._parts[scores]
        outs = q.new_zeros(2, *q.shape)
        lses = q.new_full(outs.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype))
        ops = backends.functions("cached_attention", q, self.backend, scores=scores)
        shared = self._shared.layer(layer)
        for seen, answers, together in of_shared:
            packed = together.pack(q[answers], shared.keys.shape[1])
            found = ops.cached_attention(packed, None, None, *shared, together.rows, seen)
            outs[0, answers], lses[0, answers] = (together.unpack(x, shared.keys.shape[1]) for x in found)
        for seen, answers, rows in of_own:
            found = ops.cached_attention(q, k, v, *self.storage.layer(layer), rows, seen)
            outs[1, answers], lses[1, answers] = (x[answers] for x in found)
        return merge_states(outs, lses, backend=self.backend)

    def _shared_parts(self, scores: Scores) -> list[tuple[Scores, Tensor | slice, _Together]]:
        """How scores are made, of which answers, and their rows, for every call over the shared traces."""
        if not scores.local:
            return [(scores, slice(None), self._whole)]
        seen = []
        for slot, row in zip(self._slots, self._rows, strict=True):
            length = self._shared.lengths[row]
            seen.append((length, length - scores.first_seen(length + self.storage.lengths[slot])))
        return [
            (part, self._index(some), _Together(self._shared, [self._rows[i] for i in some]))
            for part, some in _alike(scores, seen)
        ]

    def _own_parts(self, scores: Scores) -> list[tuple[Scores, Tensor | slice, RowRanges]]:
        """The same over the answers' own traces; where there are no chunks, a window moves along with them."""
        if scores.chunk is None:
            return [(scores, slice(None), self.rows)]
        seen = []
        for slot, row in zip(self._slots, self._rows, strict=True):
            before, own = self._shared.lengths[row], self.storage.lengths[slot]
            seen.append((own + 1, min(own + 1, before + own + 1 - scores.first_seen(before + own))))
        return [
            (
                part,
                self._index(some),
                _Ranges(self.storage, {self._slots[i]: i for i in some}, self.storage.lengths).rows,
            )
            for part, some in _alike(scores, seen)
        ]

    def _index(self, answers: Sequence[int]) -> Tensor | slice:
        whole = len(answers) == self.total
        return slice(None) if whole else torch.tensor(answers).to(self.storage.device)


class _Together:
    """Answers that see the same of their rows' shared traces: a row's answers are further query heads of its keys'
    heads, so that one pass over the keys and values serves all of them. `rows`: the operator's, a token each.
    """

    def __init__(self, shared: Columns, rows: Sequence[int]):
        token_of = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        self.rows = _Ranges(shared, token_of, [n - 1 for n in shared.lengths]).rows
        # Which of its row's blocks of heads each answer is.
        taken, blocks = dict.fromkeys(token_of, 0), []
        for row in rows:
            blocks.append(taken[row])
            taken[row] += 1
        self._grid = len(token_of), max(taken.values())
        at = [token_of[row] * self._grid[1] + block for row, block in zip(rows, blocks, strict=True)]
        whole = at == list(range(self._grid[0] * self._grid[1]))
        self._at = None if whole else torch.tensor(at).to(shared.device)

    def pack(self, q: Tensor, kv_heads: int) -> Tensor:
        """`[answers, heads, D]` to `[rows, kv_heads · samples · group, D]`."""
        rows, samples = self._grid
        if self._at is not None:
            q = q.new_zeros(rows * samples, *q.shape[1:]).index_copy_(0, self._at, q)
        return q.unflatten(0, (rows, samples)).unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(1, 3)

    def unpack(self, x: Tensor, kv_heads: int) -> Tensor:
        """`[rows, kv_heads · samples · group, …]` to `[answers, heads, …]`."""
        x = x.unflatten(1, (kv_heads, self._grid[1], -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        return x if self._at is None else x[self._at]


def _alike(scores: Scores, seen: Sequence[tuple[int, int]]) -> list[tuple[Scores, list[int]]]:
    """Of `(columns, how many of the last of them an answer sees)`: the answers that see as many, those that see nothing
    left out, and scores that let them.
    """
    groups: dict[int | None, list[int]] = {}
    for answer, (columns, last) in enumerate(seen):
        if last > 0:
            groups.setdefault(None if last >= columns else last, []).append(answer)
    return [(scores._replace(window=last, chunk=None), some) for last, some in groups.items()]


def _take(columns: Columns, prompts: Sequence[Prompt]) -> list[int]:
    """Rows that hold the traces of `prompts`; the first batch of them is taken over whole, without a copy."""
    trace = prompts[0].trace if prompts else None
    if not columns.lengths and trace and [p.row for p in prompts if p.trace is trace] == list(range(trace.batch)):
        return columns.adopt(trace) + [columns.copy(p.trace, p.row) for p in prompts[trace.batch :]]
    return [columns.copy(p.trace, p.row) for p in prompts]
