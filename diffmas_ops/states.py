"""What recurrent layers remember of a trace's rows: it can be continued, but neither moved nor merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

#: Of one layer, by name: tensors `[rows, …]`. Empty before its first token.
State = dict[str, Tensor]


class RecurrentStates:
    """The states of all recurrent layers as the last call left them, with the autograd history of all calls.

    `layers`: by index; without an entry for layers that keep keys and values only.
    """

    def __init__(self, layers: dict[int, State] | None = None):
        self.layers = layers or {}

    def __bool__(self) -> bool:
        return bool(self.layers)

    def __iter__(self) -> Iterator[Tensor]:
        return (tensor for state in self.layers.values() for tensor in state.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> RecurrentStates:
        """Every tensor, changed."""
        return RecurrentStates({i: {k: function(x) for k, x in state.items()} for i, state in self.layers.items()})

    def select(self, rows: Sequence[int]) -> RecurrentStates:
        """Copies, without gradient, of rows `rows`."""
        return self.map(lambda x: x.detach()[torch.tensor(rows, device=x.device)])

    def detach_(self) -> None:
        """Cut the gradient."""
        self.layers = self.map(Tensor.detach).layers

    @classmethod
    def joined(cls, parts: Sequence[RecurrentStates]) -> RecurrentStates:
        """The rows of all `parts`, one after the other."""
        layers = [part.layers for part in parts if part]
        first = layers[0] if layers else {}
        return cls({i: {k: torch.cat([part[i][k] for part in layers]) for k in state} for i, state in first.items()})
