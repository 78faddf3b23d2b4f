"""Attention of a call's new tokens over their rows' trace, differentiable through everything the trace holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas_ops import backends
from diffmas_ops.call import Call
from diffmas_ops.scores import Scores


# Dynamo would specialise on the call handle and compile anew for every call.
@torch.compiler.disable
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    layer: int,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Append `k, v` to the trace and attend: query token at position p of a row sees its columns up to p.

    Gradients reach `q, k, v` of this call and of every earlier call of the trace, and `sinks`; they are first-order
    only. Running a call's layer again (activation checkpointing, non-reentrant) rewrites the same columns.

    Args:
        q: `[total, num_heads, head_dim]`, rotated.
        k: `[total, num_kv_heads, head_dim]`, like queries; `num_heads` is a multiple of `num_kv_heads`.
        v: `[total, num_kv_heads, value_dim]`, `value_dim` at most `head_dim`. Smaller values are kept and attended to
            as `head_dim` with zeros behind them: the trace holds, and every kernel reads, `head_dim / value_dim` times
            the bytes of values that it has to (1.5 for 192 and 128).
        call: from :meth:`KVTrace.open`; `total` is its number of new tokens.
        layer: which of the trace's layers.
        softmax_scale: of the scores; default `head_dim ** -0.5`.
        window: columns a query sees, the last of them its own; None: all.
        softcap: scores s become `softcap * tanh(s / softcap)`; None: they stay as they are.
        chunk: the query sees no column before `p // chunk * chunk`; None: no such border.
        sinks: `[num_heads]`, for every query head the score of a column that has no value: it takes part in the
            softmax and adds nothing. It is neither scaled nor capped.

    Returns:
        `[total, num_heads, value_dim]` in the dtype of `q`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit the call, each named; a size out of range.
        UnsupportedError: a window, cap or chunk that the call's backend does not have.
    """
    _check(q, k, v, call, layer, sinks)
    scores = Scores(q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale), window, softcap, chunk)
    scores.check()
    value_dim = v.shape[2]
    if value_dim < k.shape[2]:
        v = F.pad(v, (0, k.shape[2] - value_dim))
    order = call.enter(layer)
    inputs = (q, k, v, order) if sinks is None else (q, k, v, order, sinks)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        out, order = _CachedAttention.apply(q, k, v, order, sinks, call, layer, scores)
    else:
        out = _forward(q, k, v, sinks, call, layer, scores)[0]
    call.leave(layer, order)
    return out if value_dim == out.shape[2] else out[..., :value_dim]


def _forward(q, k, v, sinks, call, layer, scores) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    if call.attend is not None:
        out, lse = call.attend(q, k, v, layer, scores, sinks)
    else:
        ops = backends.functions("cached_attention", q, call.backend, many=call.streak is None, scores=scores)
        out, lse = ops.cached_attention(q, k, v, *call.storage.layer(layer), call.rows, scores)
    if sinks is None:
        return out, lse
    # A column more in the denominator; whatever is merged has been.
    whole = torch.logaddexp(lse, sinks.to(lse.dtype))
    return (out * torch.exp(lse - whole).unsqueeze(-1)).to(out.dtype), whole


class _CachedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, order, sinks, call, layer, scores):
        out, lse = _forward(q, k, v, sinks, call, layer, scores)
        ctx.save_for_backward(q, out, lse, sinks)
        ctx.call, ctx.layer, ctx.scores = call, layer, scores
        ctx.set_materialize_grads(False)
        return out, order.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, out, lse, sinks = ctx.saved_tensors
        # Only later calls may have used this one: its own queries then owe nothing.
        grad_out = torch.zeros_like(out) if grad_out is None else _unit_stride(grad_out)
        # Probabilities and delta follow from out and lse, so that these know of the sink is all it takes.
        grads = ctx.call.gradients.backward(ctx.call, ctx.layer, grad_out, q, out, lse, ctx.scores)
        of_sinks = None
        if ctx.needs_input_grad[4]:
            delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            of_sinks = -(torch.exp(sinks.to(lse.dtype) - lse) * delta).sum(0).to(sinks.dtype)
        return *grads, None, of_sinks, None, None, None


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, call: Call, layer: int, sinks: Tensor | None) -> None:
    if not 0 <= layer < call.storage.num_layers:
        raise ValueError(f"layer is {layer}; allowed: 0 … {call.storage.num_layers - 1}, the layers of the trace")
    _, num_kv_heads, _, head_dim = call.storage.layer(layer).keys.shape
    if q.dim() != 3 or q.shape[0] != call.total or q.shape[2] != head_dim or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; allowed: [{call.total}, a multiple of {num_kv_heads}, {head_dim}] "
            "(tokens of the call, heads, head_dim)"
        )
    if tuple(k.shape) != (call.total, num_kv_heads, head_dim):
        raise ValueError(f"k has shape {tuple(k.shape)}; allowed: {[call.total, num_kv_heads, head_dim]}")
    if v.dim() != 3 or tuple(v.shape[:2]) != (call.total, num_kv_heads) or not 1 <= v.shape[2] <= head_dim:
        expected = f"[{call.total}, {num_kv_heads}, 1 … {head_dim}]"
        raise ValueError(f"v has shape {tuple(v.shape)}; allowed: {expected}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != call.storage.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; allowed: {call.storage.dtype}, the trace's dtype")
        if tensor.device != call.storage.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {call.storage.device}, the trace's device")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; allowed: 1")
    if sinks is None:
        return
    if tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}; allowed: {[q.shape[1]]}, the heads of q")
    if not sinks.is_floating_point():
        raise TypeError(f"sinks is {sinks.dtype}; allowed: floating-point dtypes")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}; allowed: {q.device}, the device of q")
