"""The buffers of a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from diffmas_ops.dtypes import accumulation_dtype


class Stack(NamedTuple):
    """Neighbouring layers of one shape: `keys, values [layers, batch, num_kv_heads, capacity, head_dim]`."""

    keys: Tensor
    values: Tensor

    def zeros(self) -> Stack:
        """In which gradients of keys and values add up."""
        acc = accumulation_dtype(self.keys.dtype)
        return Stack(*(torch.zeros(x.shape, dtype=acc, device=x.device) for x in self))

    def layers(self) -> list[Stack]:
        """Each layer's `[batch, num_kv_heads, capacity, head_dim]`."""
        return [Stack(*layer) for layer in zip(*(x.unbind(0) for x in self), strict=True)]

    def part(self, begin: int, end: int) -> Stack:
        """Layers `begin … end - 1` of it."""
        return Stack(self.keys[begin:end], self.values[begin:end])


class TraceStorage:
    """The buffers of a trace, in stacks of neighbouring layers whose sizes agree; a uniform model has one.

    Attributes:
        stacks: in the order of layers. num_layers, batch, capacity: theirs together. dtype, device: of all.
    """

    def __init__(self, stacks: Sequence[Stack]):
        self._replace(stacks)
        keys = stacks[0].keys
        self.dtype, self.device, self.batch = keys.dtype, keys.device, keys.shape[1]
        self.num_layers = len(self._layers)

    @classmethod
    def allocate(
        cls, shapes: Sequence[tuple[int, int]], batch: int, capacity: int, dtype: torch.dtype, device
    ) -> TraceStorage:
        """Undefined buffers of layers with `(num_kv_heads, head_dim)` each."""
        sizes = [(len(list(alike)), batch, heads, capacity, dim) for (heads, dim), alike in groupby(shapes)]
        return cls([Stack(*(torch.empty(s, dtype=dtype, device=device) for _ in range(2))) for s in sizes])

    @property
    def capacity(self) -> int:
        return self.stacks[0].keys.shape[3]

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """`(num_kv_heads, head_dim)` of every layer."""
        return tuple((keys.shape[1], keys.shape[3]) for keys, _ in self._layers)

    def layer(self, index: int) -> Stack:
        """Keys and values of one layer, `[batch, num_kv_heads, capacity, head_dim]`."""
        return self._layers[index]

    def buffers(self) -> Iterator[Tensor]:
        """Keys and values of all stacks."""
        for stack in self.stacks:
            yield from stack

    def new_accumulators(self) -> list[Stack]:
        """Zeros of the shape of the stacks, in which their gradients add up."""
        return [stack.zeros() for stack in self.stacks]

    def grow(self, capacity: int) -> None:
        """Move to buffers of `capacity` columns."""
        self._replace([Stack(*(_grown(old, capacity) for old in stack)) for stack in self.stacks])

    def _replace(self, stacks: Sequence[Stack]) -> None:
        self.stacks = list(stacks)
        # Views made once: a latent step's layer asks for them forward and backward.
        self._layers = [layer for stack in stacks for layer in stack.layers()]


def _grown(old: Tensor, capacity: int) -> Tensor:
    new = old.new_empty(*old.shape[:3], capacity, old.shape[4])
    new[:, :, :, : old.shape[3]] = old
    return new
