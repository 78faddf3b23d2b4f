"""A random decoder layer over a ragged trace, as the operators' arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmas_ops.decoder_layer import reference
from diffmas_ops.layer import BackwardInput, BackwardOutput, Forward, Parameters, Turns
from diffmas_ops.rows import RowRanges
from diffmas_ops.scores import Scores

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 24, 40, 4, 2, 12
SCORES = Scores(0.3)


class LayerProblem:
    """`new` tokens a row behind `starts`.

    `outputs`: only each row's last tokens are wanted. `adapted`: which of the seven products have an adapter. `before`,
    `behind`: whether norms stand there. `all_heads`: whether head norms are of all heads together.
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
        scores: Scores = SCORES,
        before: bool = True,
        behind: bool = False,
        all_heads: bool = False,
        parts: Sequence[float] = (),
        dtype: torch.dtype = torch.float32,
    ):
        self.scores = scores
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
        of_heads = (q, kv) if all_heads else (DIM, DIM)
        norms = [1 + draw(n, scale=0.3) for n in (HIDDEN, HIDDEN, *of_heads, HIDDEN, HIDDEN)]
        present = [before, before, head_norms, head_norms]
        ranks = [rank if i in adapted else 0 for i in range(7)]
        self.parameters = Parameters(
            [norms[i] if there else none for i, there in enumerate(present)] + (norms[4:] if behind else []),
            1e-6,
            [draw(*shape, scale=0.2) for shape in shapes],
            [draw(out) if i in biases else none for i, (out, _) in enumerate(shapes)] if biases else [],
            [draw(r, size, scale=0.2) for r, (_, size) in zip(ranks, shapes, strict=True)],
            [draw(out, r, scale=0.2) for r, (out, _) in zip(ranks, shapes, strict=True)],
            [0.5 + i for i in range(7)],
            parts,
        )
        self.h = draw(tokens, HIDDEN)
        angles = draw(tokens, DIM // 2).repeat(1, 2)
        self.turns = Turns(angles.cos(), angles.sin())
        columns = max(n + s for n, s in zip(new, starts, strict=True)) + 2
        self.trace = [draw(len(new), KV_HEADS, columns, DIM) for _ in range(2)]
        ends = torch.tensor(new).cumsum(0).tolist()
        begins = [end - n for end, n in zip(ends, new, strict=True)]
        longest, seen = max(new), columns - 2
        self.rows = RowRanges(indices(begins), indices(ends), indices(starts), longest, seen)
        self.index, self.queries = None, self.rows
        if outputs:
            wanted = [min(n, 2) for n in new]
            self.index = torch.tensor([i for end, n in zip(ends, wanted, strict=True) for i in range(end - n, end)])
            bounds = [0, *torch.tensor(wanted).cumsum(0).tolist()]
            first = [s + n - w for s, n, w in zip(starts, new, wanted, strict=True)]
            self.queries = RowRanges(indices(bounds[:-1]), indices(bounds[1:]), indices(first), max(wanted), seen)
        self.result, self.saved = reference.decoder_layer(*self.forward_arguments())
        count = len(self.result)
        self.grads = [draw(count, HIDDEN), draw(count, HEADS, DIM), *(draw(tokens, KV_HEADS, DIM) for _ in range(2))]

    def forward_arguments(self) -> Forward:
        keys, values = (x.clone() for x in self.trace)
        return Forward(
            self.h, self.turns, self.parameters, keys, values, self.rows, self.index, self.queries, self.scores
        )

    def output_arguments(self) -> BackwardOutput:
        return BackwardOutput(self.grads[0], self.turns, self.saved.of_output, self.parameters, self.index)

    def input_arguments(self) -> BackwardInput:
        grad_middle, *grads = self.grads
        return BackwardInput(*grads, grad_middle, self.h, self.turns, self.saved.of_input, self.parameters, self.index)
