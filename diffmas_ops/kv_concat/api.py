"""Concatenation of ragged trace segments into a new trace, with every key re-phased to its new position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas_ops import backends
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.trace import KVTrace


@dataclass(frozen=True)
class Segment:
    """Columns `begin[b] … end[b] - 1` of every row b of `trace`."""

    trace: KVTrace
    begin: Sequence[int]
    end: Sequence[int]


@dataclass(frozen=True)
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
    rotary: Rotary | None,
    dtype: torch.dtype | None = None,
    grow: bool = False,
    backend: str = "auto",
    allocate: Callable[..., KVTrace] = KVTrace.allocate,
) -> KVTrace:
    """A new trace whose row b holds the rows b of all segments, one after the other.

    A key moved from column p to column p' is turned by `(p' - p) · inv_freq`, so that it is what the model would
    have written there. Gradients flow back into the segments' traces.

    Args:
        segments: at least one; all traces agree in layers, batch, heads, head_dim, device and gradient dtype.
        capacity: columns of the new trace; at least the longest row.
        rotary: of the model that wrote the keys; None for a model without rotary embedding.
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

    trace = allocate(
        num_layers=first.num_layers, batch=first.batch, num_kv_heads=first.num_kv_heads, capacity=capacity,
        head_dim=first.head_dim, dtype=dtype, device=first.device, grow=grow, backend=backend,
    )  # fmt: skip
    table = torch.tensor([[list(s.begin) for s in segments], counts, dest_begin], dtype=torch.int32)
    source_begin, count, dest = table.to(first.device).unbind(0)
    cos, sin = _angles(table[2] - table[0], rotary, accumulation_dtype(dtype), first)
    plan = (source_begin, count, dest, cos, sin, rotary is not None and rotary.interleaved)

    sources = [s.trace for s in segments]
    ops = backends.functions("kv_concat", trace.keys, backend)
    ops.kv_concat([s.keys for s in sources], [s.values for s in sources], trace.keys, trace.values, *plan)
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


class _Origin:
    """What the backward of a concatenation needs of both sides (never an order token: that would be a cycle)."""

    def __init__(self, trace: KVTrace, sources: list[KVTrace], plan: tuple):
        self.gradients, self.lengths, self.max_seqlen_k = trace.gradients, trace.lengths, max(trace.host_lengths)
        self.num_layers, self.backend = trace.num_layers, trace.backend
        self.sources = [s.gradients for s in sources]
        self.plan = plan

    def backward(self) -> None:
        for layer in range(self.num_layers):
            self.gradients.flush(layer, self.lengths, self.max_seqlen_k)
        keys, values = self.gradients.accumulators()
        source_keys, source_values = zip(*(s.accumulators() for s in self.sources), strict=True)
        ops = backends.functions("kv_concat", keys, self.backend)
        ops.kv_concat_backward(keys, values, list(source_keys), list(source_values), *self.plan)


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


def _angles(shift: Tensor, rotary: Rotary | None, acc: torch.dtype, like: KVTrace):
    """Cosines and sines `[n, B, R/2]` of the turns by `shift [n, B]` positions; None where nothing moves."""
    if rotary is None:
        return None, None
    if rotary.inv_freq.dim() != 1 or 2 * rotary.inv_freq.numel() > like.head_dim:
        shape = tuple(rotary.inv_freq.shape)
        raise ValueError(f"rotary.inv_freq has shape {shape}; allowed: [R/2] with R ≤ {like.head_dim}, the head_dim")
    if not shift.any():
        return None, None
    angles = shift.to(like.device).double().unsqueeze(-1) * rotary.inv_freq.to(like.device).double()
    return angles.cos().to(acc), angles.sin().to(acc)


def _check(segments: Sequence[Segment], capacity: int) -> KVTrace:
    if not segments:
        raise ValueError("segments is empty; allowed: at least one segment")
    first = segments[0].trace
    for i, segment in enumerate(segments):
        trace = segment.trace
        for name in ("num_layers", "batch", "num_kv_heads", "head_dim", "device"):
            if getattr(trace, name) != getattr(first, name):
                raise ValueError(
                    f"segments[{i}].trace has {name} {getattr(trace, name)}; allowed: {getattr(first, name)}, "
                    "that of the first segment's trace"
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
