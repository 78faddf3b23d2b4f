"""A random decoder layer over a ragged trace, as the operators' arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmas_ops.decoder_layer import reference

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 24, 40, 4, 2, 12


class LayerProblem:
    """`new` tokens a row behind `starts`.

    `outputs`: only each row's last tokens are wanted. `adapted`: which of the seven products have an adapter.
    """

    def __init__(
        self,
        new: Sequence[int],
        starts: Sequence[int],
        *,
        outputs: bool = False,
        head_norms: bool = True,
        biases: Sequence[int] = (),
        adapted: Sequence[int] = range(7),
        rank: int = 3,
        dtype: torch.dtype = torch.float32,
    ):
        generator = torch.Generator().manual_seed(sum(new) + sum(starts))

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def indices(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        q, kv, tokens, none = HEADS * DIM, KV_HEADS * DIM, sum(new), torch.empty(0, dtype=dtype)
        shapes = [
            (q, HIDDEN),
            (kv, HIDDEN),
            (kv, HIDDEN),
            (HIDDEN, q),
            (INNER, HIDDEN),
            (INNER, HIDDEN),
            (HIDDEN, INNER),
        ]
        norms = [1 + draw(n, scale=0.3) for n in (HIDDEN, HIDDEN, DIM, DIM)]
        ranks = [rank if i in adapted else 0 for i in range(7)]
        self.parameters = (
            norms if head_norms else [*norms[:2], none, none],
            1e-6,
            [draw(*shape, scale=0.2) for shape in shapes],
            [draw(out) if i in biases else none for i, (out, _) in enumerate(shapes)] if biases else [],
            [draw(r, size, scale=0.2) for r, (_, size) in zip(ranks, shapes, strict=True)],
            [draw(out, r, scale=0.2) for r, (out, _) in zip(ranks, shapes, strict=True)],
            [0.5 + i for i in range(7)],
        )
        self.h = draw(tokens, HIDDEN)
        angles = draw(tokens, DIM // 2).repeat(1, 2)
        self.turns = angles.cos(), angles.sin()
        columns = max(n + s for n, s in zip(new, starts, strict=True)) + 2
        self.trace = [draw(len(new), KV_HEADS, columns, DIM) for _ in range(2)]
        ends = torch.tensor(new).cumsum(0).tolist()
        begins = [end - n for end, n in zip(ends, new, strict=True)]
        self.rows = indices(begins), indices(ends), indices(starts)
        wanted = [min(n, 2) for n in new] if outputs else list(new)
        self.index = None
        self.queries = (*self.rows, max(new))
        if outputs:
            self.index = torch.tensor([i for end, n in zip(ends, wanted, strict=True) for i in range(end - n, end)])
            bounds = [0, *torch.tensor(wanted).cumsum(0).tolist()]
            first = [s + n - w for s, n, w in zip(starts, new, wanted, strict=True)]
            self.queries = indices(bounds[:-1]), indices(bounds[1:]), indices(first), max(wanted)
        self.max_seqlen_q, self.max_seqlen_k = max(new), columns - 2
        self.states = reference.decoder_layer(*self.forward_arguments())
        count = len(self.states[0])
        self.grads = [draw(count, HIDDEN), draw(count, HEADS, DIM), *(draw(tokens, KV_HEADS, DIM) for _ in range(2))]

    def forward_arguments(self) -> tuple:
        trace = [x.clone() for x in self.trace]
        return (
            self.h, *self.turns, *self.parameters, *trace, *self.rows, self.max_seqlen_q, self.index, *self.queries,
            self.max_seqlen_k, 0.3,
        )  # fmt: skip

    def output_arguments(self) -> tuple:
        _, _, q, out, _, middle, gate, up, _, _, *lows = self.states
        return self.grads[0], *self.turns, q, out, middle, gate, up, *lows, *self.parameters, self.index

    def input_arguments(self) -> tuple:
        _, k, q, *_, low_q, low_kv, _, _, _ = self.states
        grad_middle, *grads = self.grads
        return *grads, grad_middle, self.h, *self.turns, k, q, low_q, low_kv, *self.parameters, self.index
