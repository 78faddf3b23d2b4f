"""Concatenation of ragged trace segments into a new trace, with every key re-phased to its new position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas_ops import backends
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.storage import Stack
from diffmas_ops.trace import KVTrace


@dataclass(frozen=True)
class Segment:
    """Columns `begin[b] … end[b] - 1` of every row b of `trace`."""

    trace: KVTrace
    begin: Sequence[int]
    end: Sequence[int]


@dataclass(frozen=True, eq=False)
class Rotary:
    """A model's rotary position embedding: `inv_freq [R/2]`, static, and how its dimensions pair up.

    `interleaved`: dims `(2d, 2d + 1)` turn together, otherwise `(d, d + R/2)`; dims from R on do not turn.
    """

    inv_freq: Tensor
    interleaved: bool = False


def kv_concat(
    segments: Sequence[Segment],
    *,
    capacity: int,
    rotary: Rotary | None | Sequence[Rotary | None],
    dtype: torch.dtype | None = None,
    grow: bool = False,
    backend: str = "auto",
    allocate: Callable[..., KVTrace] = KVTrace.allocate,
) -> KVTrace:
    """A new trace whose row b holds the rows b of all segments, one after the other.

    A key moved from column p to column p' is turned by `(p' - p) · inv_freq`, so that it is what the model would
    have written there. Gradients flow back into the segments' traces.

    Args:
        segments: at least one; all traces agree in layers and their sizes, batch, device and gradient dtype.
        capacity: columns of the new trace; at least the longest row.
        rotary: of the model that wrote the keys, or one for each layer; None: keys do not turn.
        dtype: of the new trace; default the first segment's.
        allocate: makes the new trace, from the arguments of :meth:`KVTrace.allocate`.

    Raises:
        ValueError, TypeError: segments that do not fit their trace or each other, a capacity too small.
    """
    first = _check(segments, capacity)
    dtype = dtype or first.dtype
    if accumulation_dtype(dtype) != accumulation_dtype(first.dtype):
        raise TypeError(f"dtype is {dtype}; allowed: one that shares the gradient dtype of {first.dtype}")
    counts = [[e - b for b, e in zip(s.begin, s.end, strict=True)] for s in segments]
    dest_begin, lengths = [], [0] * first.batch
    for row in counts:
        dest_begin.append(lengths)
        lengths = [at + n for at, n in zip(lengths, row, strict=True)]
    if max(lengths) > capacity:
        raise ValueError(f"capacity is {capacity}; allowed: at least {max(lengths)}, the longest concatenated row")

    num_kv_heads, head_dim = (of[0] if len(set(of)) == 1 else of for of in zip(*first.storage.shapes, strict=True))
    trace = allocate(
        num_layers=first.num_layers, batch=first.batch, num_kv_heads=num_kv_heads, capacity=capacity,
        head_dim=head_dim, dtype=dtype, device=first.device, grow=grow, backend=backend,
    )  # fmt: skip
    table = torch.tensor([[list(s.begin) for s in segments], counts, dest_begin], dtype=torch.int32)
    plan = _Plan(
        table.to(first.device),
        _stretches(first, rotary, table[2] - table[0], accumulation_dtype(dtype)),
        backend,
    )
    sources = [s.trace for s in segments]
    plan.forward([s.storage.stacks for s in sources], trace.storage.stacks)
    trace.host_lengths = lengths
    trace.lengths = torch.tensor(lengths, dtype=torch.int32, device=first.device)
    if torch.is_grad_enabled() and any(s.order.token.requires_grad for s in sources):
        # Of a trace that appears twice, one token is enough: its calls wait for it either way.
        tokens = {id(s): s.order.token for s in sources}
        origin = _Origin(trace, sources, plan)
        trace.order.advance(_Concat.apply(origin, *tokens.values()), lengths)
    else:
        trace.detach_()
    return trace


class _Stretch(NamedTuple):
    """Layers `begin … end - 1` of a stack, whose keys turn alike: by cosines and sines `[n, B, R/2]`, or not at all."""

    stack: int
    begin: int
    end: int
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool


class _Plan(NamedTuple):
    """Which columns go where (`table`, int32 `[3, n, B]`: first column, number, destination), and how keys turn."""

    table: Tensor
    stretches: list[_Stretch]
    backend: str

    def forward(self, sources: list[list[Stack]], whole: list[Stack]) -> None:
        for at in self.stretches:
            ops = backends.functions("kv_concat", whole[at.stack].keys, self.backend)
            ops.kv_concat(*self._parts(sources, at), *self._whole(whole, at), *self.table, *at[3:])

    def backward(self, whole: list[Stack], sources: list[list[Stack]]) -> None:
        for at in self.stretches:
            ops = backends.functions("kv_concat", whole[at.stack].keys, self.backend)
            ops.kv_concat_backward(*self._whole(whole, at), *self._parts(sources, at), *self.table, *at[3:])

    @staticmethod
    def _whole(stacks: list[Stack], at: _Stretch) -> Stack:
        return stacks[at.stack].part(at.begin, at.end)

    def _parts(self, sources: list[list[Stack]], at: _Stretch) -> tuple[list[Tensor], list[Tensor]]:
        parts = [self._whole(stacks, at) for stacks in sources]
        return [part.keys for part in parts], [part.values for part in parts]


class _Origin:
    """What the backward of a concatenation needs of both sides (never an order token: that would be a cycle)."""

    def __init__(self, trace: KVTrace, sources: list[KVTrace], plan: _Plan):
        self.gradients, self.lengths, self.max_seqlen_k = trace.gradients, trace.lengths, max(trace.host_lengths)
        self.num_layers = trace.num_layers
        self.sources = [s.gradients for s in sources]
        self.plan = plan

    def backward(self) -> None:
        for layer in range(self.num_layers):
            self.gradients.flush(layer, self.lengths, self.max_seqlen_k)
        self.plan.backward(self.gradients.accumulators(), [s.accumulators() for s in self.sources])


class _Concat(torch.autograd.Function):
    """Carries only the order tokens; keys and values are written, and their gradients read, beside autograd."""

    @staticmethod
    def forward(ctx, origin, *orders):
        ctx.origin = origin
        return orders[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        ctx.origin.backward()
        return (None,) * len(ctx.needs_input_grad)


def _stretches(
    like: KVTrace, rotary: Rotary | None | Sequence[Rotary | None], shift: Tensor, acc: torch.dtype
) -> list[_Stretch]:
    """The layers of a trace, as long as they are stacked and turn alike, for columns that move by `shift [n, B]`."""
    rotaries = list(rotary) if isinstance(rotary, Sequence) else [rotary] * like.num_layers
    if len(rotaries) != like.num_layers:
        raise ValueError(f"rotary has {len(rotaries)} entries; allowed: one a layer, {like.num_layers}")
    for one, (_, head_dim) in zip(rotaries, like.storage.shapes, strict=True):
        if one is not None and (one.inv_freq.dim() != 1 or 2 * one.inv_freq.numel() > head_dim):
            shape = tuple(one.inv_freq.shape)
            raise ValueError(f"rotary.inv_freq has shape {shape}; allowed: [R/2] with R ≤ {head_dim}, the head_dim")
    moving = [one if shift.any() else None for one in rotaries]
    angles = {id(one): _angles(shift.to(like.device), one, acc) for one in moving}
    stretches, layer = [], 0
    for index, stack in enumerate(like.storage.stacks):
        begin = 0
        for _, alike in groupby(moving[layer : layer + len(stack.keys)], key=id):
            one, *more = alike
            end = begin + 1 + len(more)
            stretches.append(_Stretch(index, begin, end, *angles[id(one)], one is not None and one.interleaved))
            begin = end
        layer += len(stack.keys)
    return stretches


def _angles(shift: Tensor, rotary: Rotary | None, acc: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines `[n, B, R/2]` of the turns by `shift [n, B]` positions."""
    if rotary is None:
        return None, None
    angles = shift.double().unsqueeze(-1) * rotary.inv_freq.to(shift.device).double()
    return angles.cos().to(acc), angles.sin().to(acc)


def _shape(trace: KVTrace) -> object:
    """Of all layers, or of every one where they differ."""
    shapes = trace.storage.shapes
    return shapes[0] if len(set(shapes)) == 1 else shapes


#: What the segments' traces have in common.
_SAME: dict[str, Callable[[KVTrace], object]] = {
    "num_layers": lambda trace: trace.num_layers,
    "batch": lambda trace: trace.batch,
    "num_kv_heads and head_dim": _shape,
    "device": lambda trace: trace.device,
}


def _check(segments: Sequence[Segment], capacity: int) -> KVTrace:
    if not segments:
        raise ValueError("segments is empty; allowed: at least one segment")
    first = segments[0].trace
    for i, segment in enumerate(segments):
        trace = segment.trace
        for name, of in _SAME.items():
            if of(trace) != of(first):
                raise ValueError(
                    f"segments[{i}].trace has {name} {of(trace)}; allowed: {of(first)}, that of the first segment's "
                    "trace"
                )
        if accumulation_dtype(trace.dtype) != accumulation_dtype(first.dtype):
            raise TypeError(f"segments[{i}].trace is {trace.dtype}; allowed: one that mixes with {first.dtype}")
        if trace.states:
            raise ValueError(f"segments[{i}].trace has recurrent states; allowed: none, they can only be continued")
        if len(segment.begin) != trace.batch or len(segment.end) != trace.batch:
            raise ValueError(
                f"segments[{i}] has {len(segment.begin)} begins and {len(segment.end)} ends; allowed: one per row, "
                f"{trace.batch}"
            )
        for row, (begin, end) in enumerate(zip(segment.begin, segment.end, strict=True)):
            if not 0 <= begin <= end <= trace.host_lengths[row]:
                raise ValueError(
                    f"segments[{i}] takes columns {begin} … {end} of row {row}; allowed: 0 ≤ begin ≤ end ≤ "
                    f"{trace.host_lengths[row]}, the row's length"
                )
    return first
