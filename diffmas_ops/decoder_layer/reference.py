"""A decoder layer with low-rank adapters over a trace: the specification. float32 and float64, no autograd.

The layer is `h + attention(norm h)`, then `+ mlp(norm ·)` (Llama, arXiv 2302.13971): RMS norms (arXiv 1910.07467),
rotated heads (arXiv 2104.09864, half-split), perhaps normalised, grouped queries, a gated unit (arXiv 2002.05202).
Norms may stand behind attention and MLP, too or instead, and what is added may be scaled. Every product is
`x Wᵀ + bias + s (x Aᵀ) Bᵀ` (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmas_ops.cached_attention.reference import cached_attention
from diffmas_ops.decoder_layer import checks
from diffmas_ops.kv_append.reference import kv_append
from diffmas_ops.layer import (
    DOWN,
    GATE,
    UP,
    BackwardInput,
    BackwardOutput,
    Forward,
    K,
    O,
    Parameters,
    Parts,
    Q,
    Saved,
    SavedInput,
    SavedOutput,
    Turns,
    V,
)  # fmt: skip
from diffmas_ops.rows import RowRanges
from diffmas_ops.scores import Scores


def linear(p: Parameters, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The product, and `x Aᵀ`."""
    low = x @ p.a[i].T
    y = x @ p.weights[i].T + p.scalings[i] * (low @ p.b[i].T)
    return (y + p.biases[i] if p.biases and p.biases[i].numel() else y), low


def linear_backward(p: Parameters, i: int, grad: Tensor, x: Tensor, low: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradient of `x`, and those of A and B where there are any."""
    grad_low = p.scalings[i] * (grad @ p.b[i])
    grad_x = grad @ p.weights[i] + grad_low @ p.a[i]
    adapters = [grad_low.T @ x, p.scalings[i] * (grad.T @ low)]
    return grad_x, adapters if p.a[i].shape[0] else []


def _parts(p: Parameters) -> Parts:
    return Parts(*p.parts)


def _present(p: Parameters, norm: int) -> bool:
    return norm < len(p.norms) and p.norms[norm].numel() > 0


def norm(p: Parameters, i: int, x: Tensor) -> Tensor:
    """Over as many numbers as norm `i` has weights; `x` itself where there is none."""
    if not _present(p, i):
        return x
    parts = x.unflatten(-1, (-1, p.norms[i].numel()))
    inverse = (parts.square().mean(-1, keepdim=True) + p.epsilon).rsqrt()
    return (parts * inverse * (p.norms[i] + _parts(p).norm_offset)).flatten(-2)


def norm_backward(p: Parameters, i: int, grad: Tensor, x: Tensor) -> Tensor:
    if not _present(p, i):
        return grad
    parts, grad = (each.unflatten(-1, (-1, p.norms[i].numel())) for each in (x, grad))
    inverse = (parts.square().mean(-1, keepdim=True) + p.epsilon).rsqrt()
    unit, grad = parts * inverse, grad * (p.norms[i] + _parts(p).norm_offset)
    return ((grad - unit * (grad * unit).mean(-1, keepdim=True)) * inverse).flatten(-2)


def rotated(p: Parameters, i: int, x: Tensor, turns: Turns) -> Tensor:
    """`x [N, heads * D]` through norm `i` as `[N, heads, D]`, rotated."""
    cos, sin = turns
    x = norm(p, i, x).unflatten(1, (-1, cos.shape[1]))
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def rotated_backward(p: Parameters, i: int, grad: Tensor, x: Tensor, turns: Turns) -> Tensor:
    cos, sin = turns
    first, second = (grad * sin[:, None]).chunk(2, -1)
    grad = grad * cos[:, None] + torch.cat((second, -first), -1)
    return norm_backward(p, i, grad.flatten(1), x)


def gate_of(p: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gate's sigmoid of `x`, and the derivative of `x` times it."""
    s = (x * (_parts(p).slope + _parts(p).cubic * x.square())).sigmoid()
    return s, s * (1 + x * (_parts(p).slope + 3 * _parts(p).cubic * x.square()) * (1 - s))


def decoder_layer(
    h: Tensor,
    turns: Turns,
    parameters: Parameters,
    keys: Tensor,
    values: Tensor,
    rows: RowRanges,
    outputs: Tensor | None,
    queries: RowRanges,
    scores: Scores,
) -> tuple[Tensor, Saved]:
    """`h [N, hidden]` of a call's tokens through the layer; their keys and values go to the rows' ends.

    Args:
        h: `[N, hidden]`, as rows one after the other.
        keys, values: `[batch, Hkv, capacity, D]`, written in place.
        rows: of all tokens.
        outputs: int64 `[M]`, the tokens whose result is wanted; None: all.
        queries: of those.
        scores: of the attention.

    Returns:
        The result `[M, hidden]` and what the backward takes.

    Raises:
        ValueError, TypeError: an argument that does not fit, before anything is written.
    """
    given = Forward(h, turns, parameters, keys, values, rows, outputs, queries, scores)
    checks.check_contents(given, checks.check_forward(given))
    p = parameters
    x = norm(p, 0, h)
    (k, low_k), (v, low_v) = linear(p, K, x), linear(p, V, x)
    v = v.unflatten(1, (-1, turns.cos.shape[1]))
    kv_append(rotated(p, 3, k, turns), v, keys, values, rows)
    if outputs is not None:
        h, x, turns = h[outputs], x[outputs], _some(turns, outputs)
    q, low_q = linear(p, Q, x)
    out, lse = cached_attention(rotated(p, 2, q, turns), None, None, keys, values, queries, scores)
    attended, low_o = linear(p, O, out.flatten(1))
    middle = h + _parts(p).residual_scale * norm(p, 4, attended)
    x = norm(p, 1, middle)
    (gate, low_gate), (up, low_up) = linear(p, GATE, x), linear(p, UP, x)
    fed, low_down = linear(p, DOWN, gate * gate_of(p, gate)[0] * up)
    result = middle + _parts(p).residual_scale * norm(p, 5, fed)
    lows = (low_q, torch.cat((low_k, low_v), 1), low_o, torch.cat((low_gate, low_up), 1), low_down)
    states = torch.cat((middle, attended, fed)) if _present(p, 4) else middle
    return result, Saved(k, q, out, lse, states, gate, up, *lows)


def decoder_layer_backward_output(
    grad: Tensor, turns: Turns, saved: SavedOutput, parameters: Parameters, outputs: Tensor | None
) -> list[Tensor]:
    """From the gradient of the result to that of the attention's out.

    Returns the gradients of the state between attention and MLP and of `out`, the rotated queries `[M, Hq, D]`, and the
    gradients of A and B of o, gate, up and down, where there are any.
    """
    size = checks.check_backward_output(BackwardOutput(grad, turns, saved, parameters, outputs))
    checks.check_outputs(outputs, size.tokens)
    p, (q, out, states, gate, up, low_o, low_gate_up, low_down) = parameters, saved
    middle, attended, fed = states.tensor_split(3) if _present(p, 4) else (states,) * 3
    s, slope = gate_of(p, gate)
    grad_fed = norm_backward(p, 5, _parts(p).residual_scale * grad, fed)
    grad_act, of_down = linear_backward(p, DOWN, grad_fed, gate * s * up, low_down)
    x = norm(p, 1, middle)
    low_gate, low_up = low_gate_up.split([size.ranks[GATE], size.ranks[UP]], 1)
    from_gate, of_gate = linear_backward(p, GATE, grad_act * up * slope, x, low_gate)
    from_up, of_up = linear_backward(p, UP, grad_act * gate * s, x, low_up)
    grad_middle = grad + norm_backward(p, 1, from_gate + from_up, middle)
    grad_attended = norm_backward(p, 4, _parts(p).residual_scale * grad_middle, attended)
    grad_out, of_o = linear_backward(p, O, grad_attended, out.flatten(1), low_o)
    queries = rotated(p, 2, q, turns if outputs is None else _some(turns, outputs))
    return [grad_middle, grad_out.view(out.shape), queries, *of_o, *of_gate, *of_up, *of_down]


def decoder_layer_backward_input(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_middle: Tensor,
    h: Tensor,
    turns: Turns,
    saved: SavedInput,
    parameters: Parameters,
    outputs: Tensor | None,
) -> list[Tensor]:
    """From the attention's gradients `[·, heads, D]` to that of `h`, and those of A and B of q, k and v."""
    given = BackwardInput(grad_q, grad_k, grad_v, grad_middle, h, turns, saved, parameters, outputs)
    size = checks.check_backward_input(given)
    checks.check_outputs(outputs, size.tokens)
    p, (k, q, low_q, low_kv) = parameters, saved
    at = slice(None) if outputs is None else outputs
    x = norm(p, 0, h)
    low_k, low_v = low_kv.split([size.ranks[K], size.ranks[V]], 1)
    from_k, of_k = linear_backward(p, K, rotated_backward(p, 3, grad_k, k, turns), x, low_k)
    from_v, of_v = linear_backward(p, V, grad_v.flatten(1), x, low_v)
    from_q, of_q = linear_backward(p, Q, rotated_backward(p, 2, grad_q, q, _some(turns, at)), x[at], low_q)
    grad_x = from_k + from_v
    grad_x[at] += from_q
    grad_h = norm_backward(p, 0, grad_x, h)
    grad_h[at] += grad_middle
    return [grad_h, *of_q, *of_k, *of_v]


def _some(turns: Turns, at: Tensor | slice) -> Turns:
    return Turns(turns.cos[at], turns.sin[at])
