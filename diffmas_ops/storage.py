"""The buffers of a trace."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmas_ops.dtypes import accumulation_dtype


class TraceStorage:
    """The buffers of a trace: `keys, values [num_layers, batch, num_kv_heads, capacity, head_dim]`."""

    def __init__(self, keys: Tensor, values: Tensor):
        self._replace(keys, values)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, `[batch, num_kv_heads, capacity, head_dim]`."""
        return self._layers[index]

    def new_accumulators(self) -> tuple[Tensor, Tensor]:
        """Zeros of the shape of `keys` and `values`, in which their gradients add up."""
        acc = accumulation_dtype(self.keys.dtype)
        keys, values = (torch.zeros(self.keys.shape, dtype=acc, device=self.keys.device) for _ in range(2))
        return keys, values

    def grow(self, capacity: int) -> None:
        """Move to buffers of `capacity` columns."""
        grown = []
        for old in (self.keys, self.values):
            grown.append(old.new_empty(*old.shape[:3], capacity, old.shape[4]))
            grown[-1][:, :, :, : old.shape[3]] = old
        self._replace(*grown)

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        # Views made once: a latent step's layer asks for them forward and backward.
        self._layers = tuple(zip(keys.unbind(0), values.unbind(0), strict=True))
