"""A stack of toy attention layers that runs over a KVTrace and, row by row, over dense caches."""

from __future__ import annotations

import torch
from oracle import DenseTrace, rotate
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffmas_ops import Call, KVTrace, Rotary, cached_attention


class Toy:
    """`num_layers` residual attention layers on `width` features, rotary positions, weights in float64."""

    def __init__(
        self,
        *,
        num_layers=2,
        heads=4,
        kv_heads=2,
        head_dim=4,
        width=6,
        interleaved=False,
        rotary_dim=None,
        seed=0,
        sinks=False,
        **scores,
    ):
        generator = torch.Generator().manual_seed(seed)

        def weight(rows, columns):
            w = torch.randn(rows, columns, dtype=torch.float64, generator=generator) * rows**-0.5
            return w.requires_grad_()

        self.scores = scores
        if sinks:
            scores["sinks"] = torch.randn(heads, dtype=torch.float64, generator=generator).requires_grad_()
        self.num_layers, self.kv_heads, self.head_dim, self.width = num_layers, kv_heads, head_dim, width
        self.layers = [
            [weight(width, n * head_dim) for n in (heads, kv_heads, kv_heads)] + [weight(heads * head_dim, width)]
            for _ in range(num_layers)
        ]
        half = (rotary_dim or head_dim) // 2
        self.rotary = Rotary(10.0 ** (-torch.arange(half, dtype=torch.float64) / half), interleaved)
        self.parameters = [w for layer in self.layers for w in layer] + ([scores["sinks"]] if sinks else [])

    def trace(self, batch: int, capacity: int = 64, **options) -> KVTrace:
        return KVTrace.allocate(
            num_layers=self.num_layers, batch=batch, num_kv_heads=self.kv_heads, capacity=capacity,
            head_dim=self.head_dim, dtype=torch.float64, **options,
        )  # fmt: skip

    def dense(self) -> DenseTrace:
        empty = torch.zeros(0, self.kv_heads, self.head_dim, dtype=torch.float64)
        return DenseTrace([(empty, empty)] * self.num_layers, **self.scores)

    def rephase(self, x: Tensor, positions: Tensor | int) -> Tensor:
        return rotate(x, positions, self.rotary.inv_freq, self.rotary.interleaved)

    def _layer(self, hidden: Tensor, layer: int, positions: Tensor, attend) -> Tensor:
        *projections, w_out = self.layers[layer]
        q, k, v = ((hidden @ w).unflatten(-1, (-1, self.head_dim)) for w in projections)
        out = attend(self.rephase(q, positions[:, None]), self.rephase(k, positions[:, None]), v)
        return hidden + torch.tanh(out.flatten(1) @ w_out)

    def run(self, hidden: Tensor, call: Call, *, checkpointing: bool = False) -> Tensor:
        """All layers over the packed new tokens of `call`."""

        def layer(hidden, index):
            return self._layer(
                hidden,
                index,
                call.position_ids[0],
                lambda q, k, v: cached_attention(q, k, v, call, layer=index, **self.scores),
            )

        for i in range(self.num_layers):
            hidden = checkpoint(layer, hidden, i, use_reentrant=False) if checkpointing else layer(hidden, i)
        return hidden

    def run_row(self, hidden: Tensor, dense: DenseTrace) -> Tensor:
        """All layers over one row's new tokens."""
        positions = torch.arange(len(dense), len(dense) + hidden.shape[0])
        for i in range(self.num_layers):
            hidden = self._layer(hidden, i, positions, lambda q, k, v, i=i: dense.attend(i, q, k, v))
        return hidden

    def concat_rows(self, segments: list[tuple[DenseTrace, int, int]]) -> DenseTrace:
        """Segments of dense caches one after the other, every key turned to its new position."""
        result = self.dense()
        for dense, begin, end in segments:
            shift = len(result) - begin
            result.layers = [
                (torch.cat((keys, self.rephase(k[begin:end], shift))), torch.cat((values, v[begin:end])))
                for (keys, values), (k, v) in zip(result.layers, dense.layers, strict=True)
            ]
        return result
