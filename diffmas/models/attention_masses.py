"""How much attention a call pays to every column of a trace, and to the sinks of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from diffmas_ops import Call, backends
from diffmas_ops.scores import Scores

# Queries whose probabilities are held at once.
_BLOCK = 64


class AttentionMasses:
    """Runs a one-row call's attention and adds up what its last `queries` tokens pay to every column, and to sinks.

    For a call's `attend`.
    """

    def __init__(self, call: Call, queries: int):
        self._call, self._queries = call, queries
        self._layers: dict[int, Tensor] = {}
        #: Of the layers that have sinks.
        self._sinks: dict[int, Tensor] = {}

    def __call__(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: int, scores: Scores, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        call = self._call
        keys, values = call.storage.layer(layer)
        ops = backends.functions("cached_attention", q, call.backend, many=call.streak is None, scores=scores)
        out, lse = ops.cached_attention(q, k, v, keys, values, call.rows, scores)
        whole = lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype))
        keys = keys[0, :, : call.rows.max_seqlen_k].to(lse.dtype)
        columns, total = torch.arange(call.rows.max_seqlen_k, device=q.device), keys.new_zeros(call.rows.max_seqlen_k)
        positions = call.position_ids[0]
        for begin in range(len(q) - self._queries, len(q), _BLOCK):
            some = slice(begin, begin + _BLOCK)
            grouped = q[some].to(lse.dtype).unflatten(1, (keys.shape[0], -1))
            products = torch.einsum("nhgd,hcd->nhgc", grouped, keys).flatten(1, 2) * scores.softmax_scale
            probabilities = (scores.cap(products) - whole[some].unsqueeze(-1)).exp()
            total += probabilities.masked_fill(~scores.sees(positions[some, None, None], columns), 0.0).sum((0, 1))
        self._layers[layer] = total / (self._queries * q.shape[1])
        if sinks is not None:
            self._sinks[layer] = (sinks.to(lse.dtype) - whole[-self._queries :]).exp().mean()
        return out, lse

    def mean(self) -> tuple[Tensor, Tensor | None]:
        """Averaged over heads and queries, probability `[num_layers, columns]` and that of sinks `[num_layers]`.

        The second is None where no layer has any.
        """
        layers = sorted(self._layers)
        zero = self._layers[layers[0]].new_zeros(())
        sinks = torch.stack([self._sinks.get(layer, zero) for layer in layers]).cpu() if self._sinks else None
        return torch.stack([self._layers[layer] for layer in layers]).cpu(), sinks
