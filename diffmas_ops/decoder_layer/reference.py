"""A decoder layer with low-rank adapters over a trace: the specification. float32 and float64, no autograd.

The layer is `h + attention(norm h)`, then `+ mlp(norm ·)` (Llama, arXiv 2302.13971): RMS norms (arXiv 1910.07467),
rotated heads (arXiv 2104.09864, half-split), perhaps normalised, grouped queries, SwiGLU (arXiv 2002.05202). Every
product is `x Wᵀ + bias + s (x Aᵀ) Bᵀ` (LoRA, arXiv 2106.09685).

Lists hold, in this order: `norms` input, middle `[hidden]`, queries, keys `[D]` (of no element where there is none);
`weights [out, in]`, `biases [out]` (of no element where there is none; an empty list: nowhere), `a [r, in]`,
`b [out, r]` (r = 0 where there is no adapter) and `scalings` of q, k, v, o, gate, up, down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffmas_ops.cached_attention.reference import cached_attention
from diffmas_ops.decoder_layer import checks
from diffmas_ops.decoder_layer.checks import DOWN, GATE, UP, K, O, Q, V
from diffmas_ops.kv_append.reference import kv_append
from diffmas_ops.rows import RowRanges
from diffmas_ops.scores import Scores


@dataclass(frozen=True)
class Parameters:
    norms: Sequence[Tensor]
    epsilon: float
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scalings: Sequence[float]

    def linear(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product, and `x Aᵀ`."""
        low = x @ self.a[i].T
        y = x @ self.weights[i].T + self.scalings[i] * (low @ self.b[i].T)
        return (y + self.biases[i] if self.biases and self.biases[i].numel() else y), low

    def linear_backward(self, i: int, grad: Tensor, x: Tensor, low: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradient of `x`, and those of A and B where there are any."""
        grad_low = self.scalings[i] * (grad @ self.b[i])
        grad_x = grad @ self.weights[i] + grad_low @ self.a[i]
        adapters = [grad_low.T @ x, self.scalings[i] * (grad.T @ low)]
        return grad_x, adapters if self.a[i].shape[0] else []

    def norm(self, weight: Tensor, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * weight

    def norm_backward(self, weight: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        inverse = (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        unit, grad = x * inverse, grad * weight
        return (grad - unit * (grad * unit).mean(-1, keepdim=True)) * inverse

    def rotated(self, weight: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x [N, heads * D]` as `[N, heads, D]`, normalised where there is a weight, rotated."""
        x = x.unflatten(1, (-1, cos.shape[1]))
        x = self.norm(weight, x) if weight.numel() else x
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    def rotated_backward(self, weight: Tensor, grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = (grad * sin[:, None]).chunk(2, -1)
        grad = grad * cos[:, None] + torch.cat((second, -first), -1)
        x = x.unflatten(1, (-1, cos.shape[1]))
        return (self.norm_backward(weight, grad, x) if weight.numel() else grad).flatten(1)


def decoder_layer(
    h: Tensor, cos: Tensor, sin: Tensor, norms, epsilon, weights, biases, a, b, scalings, keys: Tensor, values: Tensor,
    q_begin: Tensor, q_end: Tensor, starts: Tensor, max_seqlen_q: int, outputs: Tensor | None, query_begin: Tensor,
    query_end: Tensor, query_starts: Tensor, query_max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`h [N, hidden]` of a call's tokens through the layer; their keys and values go to the rows' ends.

    `cos, sin [N, D]`. `outputs`, int64 `[M]`: the tokens whose result is wanted, None: all; `query_…` are their ranges,
    as `q_begin, q_end, starts` are all tokens'.

    Returns the result `[M, hidden]` and what the backward takes: k before rotation `[N, Hkv D]`, q `[M, Hq D]`, the
    attention's out `[M, Hq, D]` and lse `[M, Hq]`, the state between attention and MLP, gate, up, and the `x Aᵀ` of
    q, of k and v, of o, of gate and up, of down.

    Raises `ValueError` or `TypeError` for an argument that does not fit, before anything is written.
    """
    queries = (query_begin, query_end, query_starts)
    size = checks.check_forward(
        h, cos, sin, norms, epsilon, weights, biases, a, b, scalings, keys, values, q_begin, q_end, starts,
        max_seqlen_q, outputs, *queries, query_max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    checks.check_outputs(outputs, size.tokens)
    checks.check_ranges("q", q_begin, q_end, starts, size.tokens, max_seqlen_q, keys.shape[2])
    checks.check_ranges("query", *queries, size.rows, query_max_seqlen_q, max_seqlen_k)
    p = Parameters(norms, epsilon, weights, biases, a, b, scalings)
    x = p.norm(norms[0], h)
    (k, low_k), (v, low_v) = p.linear(K, x), p.linear(V, x)
    v = v.unflatten(1, (-1, cos.shape[1]))
    rows = RowRanges(q_begin, q_end, starts, max_seqlen_q, max_seqlen_k)
    kv_append(p.rotated(norms[3], k, cos, sin), v, keys, values, rows)
    if outputs is not None:
        h, x, cos, sin = (t[outputs] for t in (h, x, cos, sin))
    q, low_q = p.linear(Q, x)
    rows = RowRanges(*queries, query_max_seqlen_q, max_seqlen_k)
    scores = Scores(softmax_scale)
    out, lse = cached_attention(p.rotated(norms[2], q, cos, sin), None, None, keys, values, rows, scores)
    attended, low_o = p.linear(O, out.flatten(1))
    middle = h + attended
    x = p.norm(norms[1], middle)
    (gate, low_gate), (up, low_up) = p.linear(GATE, x), p.linear(UP, x)
    result, low_down = p.linear(DOWN, gate * gate.sigmoid() * up)
    lows = (low_q, torch.cat((low_k, low_v), 1), low_o, torch.cat((low_gate, low_up), 1), low_down)
    return middle + result, k, q, out, lse, middle, gate, up, *lows


def decoder_layer_backward_output(
    grad: Tensor, cos: Tensor, sin: Tensor, q: Tensor, out: Tensor, middle: Tensor, gate: Tensor, up: Tensor,
    low_o: Tensor, low_gate_up: Tensor, low_down: Tensor, norms, epsilon, weights, biases, a, b, scalings,
    outputs: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """From the gradient of the result to that of the attention's out.

    Returns the gradients of the state between attention and MLP and of `out`, the rotated queries `[M, Hq, D]`, and the
    gradients of A and B of o, gate, up and down, where there are any.
    """
    size = checks.check_backward_output(
        grad, cos, sin, q, out, middle, gate, up, low_o, low_gate_up, low_down, norms, epsilon, weights, biases, a, b,
        scalings, outputs,
    )  # fmt: skip
    checks.check_outputs(outputs, size.tokens)
    p = Parameters(norms, epsilon, weights, biases, a, b, scalings)
    s = gate.sigmoid()
    grad_act, of_down = p.linear_backward(DOWN, grad, gate * s * up, low_down)
    x = p.norm(norms[1], middle)
    low_gate, low_up = low_gate_up.split([a[GATE].shape[0], a[UP].shape[0]], 1)
    from_gate, of_gate = p.linear_backward(GATE, grad_act * up * s * (1 + gate * (1 - s)), x, low_gate)
    from_up, of_up = p.linear_backward(UP, grad_act * gate * s, x, low_up)
    grad_middle = grad + p.norm_backward(norms[1], from_gate + from_up, middle)
    grad_out, of_o = p.linear_backward(O, grad_middle, out.flatten(1), low_o)
    cos, sin = (t if outputs is None else t[outputs] for t in (cos, sin))
    queries = p.rotated(norms[2], q, cos, sin)
    return [grad_middle, grad_out.view(out.shape), queries, *of_o, *of_gate, *of_up, *of_down]


def decoder_layer_backward_input(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad_middle: Tensor, h: Tensor, cos: Tensor, sin: Tensor,
    k: Tensor, q: Tensor, low_q: Tensor, low_kv: Tensor, norms, epsilon, weights, biases, a, b, scalings,
    outputs: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """From the attention's gradients `[·, heads, D]` to that of `h`, and those of A and B of q, k and v."""
    size = checks.check_backward_input(
        grad_q, grad_k, grad_v, grad_middle, h, cos, sin, k, q, low_q, low_kv, norms, epsilon, weights, biases, a, b,
        scalings, outputs,
    )  # fmt: skip
    checks.check_outputs(outputs, size.tokens)
    p = Parameters(norms, epsilon, weights, biases, a, b, scalings)
    at = slice(None) if outputs is None else outputs
    x = p.norm(norms[0], h)
    low_k, low_v = low_kv.split([a[K].shape[0], a[V].shape[0]], 1)
    from_k, of_k = p.linear_backward(K, p.rotated_backward(norms[3], grad_k, k, cos, sin), x, low_k)
    from_v, of_v = p.linear_backward(V, grad_v.flatten(1), x, low_v)
    from_q, of_q = p.linear_backward(Q, p.rotated_backward(norms[2], grad_q, q, cos[at], sin[at]), x[at], low_q)
    grad_x = from_k + from_v
    grad_x[at] += from_q
    grad_h = p.norm_backward(norms[0], grad_x, h)
    grad_h[at] += grad_middle
    return [grad_h, *of_q, *of_k, *of_v]
