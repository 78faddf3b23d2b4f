"""`expected_embedding` in plain PyTorch: the specification, any dtype, any device.

Both matrices are read a block of the vocabulary at a time, with an online softmax: probabilities are never there whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffmas_ops.dtypes import accumulation_dtype

#: Tokens of the vocabulary that are looked at together.
BLOCK = 4096


def expected_embedding(
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`out = softmax(z / temperature) @ values`, and the softmax's log-sum-exp `[N]` (natural logarithm).

    `z = scale · (hidden @ keysᵀ + bias)`, or `softcap · tanh(z / softcap)` of that; `hidden [N, H]`, `keys [V, H]`,
    `values [V, E]`, `bias [V]`, `temperature [1]` in the accumulation dtype.
    """
    acc = accumulation_dtype(hidden.dtype)
    rows = hidden.to(acc)
    highest, total = rows.new_full((len(rows),), -torch.inf), rows.new_zeros(len(rows))
    out = rows.new_zeros(len(rows), values.shape[1])
    for at in _blocks(keys):
        scores = _logits(rows, keys[at], None if bias is None else bias[at], scale, softcap) / temperature
        above = torch.maximum(highest, scores.amax(-1))
        # A block in which all scores are minus infinity weighs nothing.
        base = above.masked_fill(above == -torch.inf, 0)
        kept, weights = (highest - base).exp(), (scores - base[:, None]).exp()
        total = total * kept + weights.sum(-1)
        out = out * kept[:, None] + weights @ values[at].to(acc)
        highest = above
    return (out / total[:, None]).to(hidden.dtype), highest + total.log()


def expected_embedding_backward(
    grad_out: Tensor,
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden` (its dtype) and of `temperature` (`[1]`, accumulation dtype)."""
    acc = accumulation_dtype(hidden.dtype)
    rows, grad = hidden.to(acc), grad_out.to(acc)
    grad_rows, grad_temperature = torch.zeros_like(rows), torch.zeros_like(temperature)
    for at in _blocks(keys):
        _, grad_scores, grad_products = _block_gradients(
            at, rows, grad, keys, values, bias, temperature, out, lse, scale, softcap
        )
        grad_temperature -= grad_scores
        grad_rows += grad_products @ keys[at].to(acc)
    return grad_rows.to(hidden.dtype), grad_temperature / temperature


def expected_embedding_backward_weights(
    grad_out: Tensor,
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `keys`, `values` and `bias`, in their dtypes."""
    acc = accumulation_dtype(hidden.dtype)
    rows, grad = hidden.to(acc), grad_out.to(acc)
    grads = torch.empty_like(keys), torch.empty_like(values), None if bias is None else torch.empty_like(bias)
    for at in _blocks(keys):
        weights, _, products = _block_gradients(
            at, rows, grad, keys, values, bias, temperature, out, lse, scale, softcap
        )
        grads[0][at], grads[1][at] = products.T @ rows, weights.T @ grad
        if grads[2] is not None:
            grads[2][at] = products.sum(0)
    return grads


def _blocks(keys: Tensor) -> Iterator[slice]:
    return (slice(begin, begin + BLOCK) for begin in range(0, len(keys), BLOCK))


def _logits(rows: Tensor, keys: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = rows @ keys.to(rows.dtype).T
    logits = (logits if bias is None else logits + bias.to(rows.dtype)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _block_gradients(
    at: slice,
    rows: Tensor,
    grad: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block: probabilities `[N, block]`, `Σ score · its gradient`, and gradients of `hidden @ keysᵀ` alike."""
    logits = _logits(rows, keys[at], None if bias is None else bias[at], scale, softcap)
    scores = logits / temperature
    weights = (scores - lse[:, None]).exp()
    delta = (grad * out.to(grad.dtype)).sum(-1, keepdim=True)
    grad_scores = weights * (grad @ values[at].to(grad.dtype).T - delta)
    slope = scale / temperature
    products = grad_scores * (slope if softcap is None else slope * (1 - (logits / softcap).square()))
    # A token of score minus infinity has no weight; it would make 0 · ∞ of it.
    return weights, (grad_scores * scores.clamp_min(torch.finfo(scores.dtype).min)).sum(), products
