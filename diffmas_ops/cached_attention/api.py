"""Attention of a call's new tokens over their rows' trace, differentiable through everything the trace holds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas_ops import backends
from diffmas_ops.cached_attention.mask import check_window
from diffmas_ops.call import Call
from diffmas_ops.errors import UnsupportedError


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
) -> Tensor:
    """Append `k, v` to the trace and attend: query token at position p of a row sees its columns up to p.

    Gradients reach `q, k, v` of this call and of every earlier call of the trace; they are first-order only.
    Running a call's layer again (activation checkpointing, non-reentrant) rewrites the same columns.

    Args:
        q: `[total, num_heads, head_dim]`, rotated.
        k, v: `[total, num_kv_heads, head_dim]`, keys like queries; `num_heads` is a multiple of `num_kv_heads`.
        call: from :meth:`KVTrace.open`; `total` is its number of new tokens.
        layer: which of the trace's layers.
        softmax_scale: of the scores; default `head_dim ** -0.5`.
        window: columns a query sees, the last of them its own; None: all.

    Returns:
        `[total, num_heads, head_dim]` in the dtype of `q`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit the call, each named.
        UnsupportedError: a window, where the call's backend has none or several traces are attended to.
    """
    _check(q, k, v, call, layer)
    check_window(window)
    scores = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale), window
    order = call.enter(layer)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, order))
    if needs_grad:
        out, order = _CachedAttention.apply(q, k, v, order, call, layer, *scores)
    else:
        out = _forward(q, k, v, call, layer, *scores)[0]
    call.leave(layer, order)
    return out


def _forward(q, k, v, call, layer, softmax_scale, window) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    if call.attend is not None:
        if window is not None:
            raise UnsupportedError(f"window is {window}; allowed: None, for a call over several traces")
        return call.attend(q, k, v, layer, softmax_scale)
    keys, values = call.storage.layer(layer)
    many = call.streak is None
    ops = backends.functions("cached_attention", q, call.backend, many=many, window=window)
    return ops.cached_attention(q, k, v, keys, values, call.rows, softmax_scale, window)


class _CachedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, order, call, layer, *scores):
        out, lse = _forward(q, k, v, call, layer, *scores)
        ctx.save_for_backward(q, out, lse)
        ctx.call, ctx.layer, ctx.scores = call, layer, scores
        ctx.set_materialize_grads(False)
        return out, order.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, out, lse = ctx.saved_tensors
        # Only later calls may have used this one: its own queries then owe nothing.
        grad_out = torch.zeros_like(out) if grad_out is None else _unit_stride(grad_out)
        grads = ctx.call.gradients.backward(ctx.call, ctx.layer, grad_out, q, out, lse, *ctx.scores)
        return *grads, *[None] * 5


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, call: Call, layer: int) -> None:
    if not 0 <= layer < (num_layers := call.storage.num_layers):
        raise ValueError(f"layer is {layer}; allowed: 0 … {num_layers - 1}, the layers of the trace")
    _, num_kv_heads, _, head_dim = call.storage.layer(layer).keys.shape
    if q.dim() != 3 or q.shape[0] != call.total or q.shape[2] != head_dim or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; allowed: [{call.total}, a multiple of {num_kv_heads}, {head_dim}] "
            "(tokens of the call, heads, head_dim)"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != (call.total, num_kv_heads, head_dim):
            expected = [call.total, num_kv_heads, head_dim]
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: {expected}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != call.storage.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; allowed: {call.storage.dtype}, the trace's dtype")
        if tensor.device != call.storage.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {call.storage.device}, the trace's device")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; allowed: 1")
