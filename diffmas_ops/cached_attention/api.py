"""Attention of a call's new tokens over their rows' trace, differentiable through everything the trace holds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas_ops import backends
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.trace import Call


# Dynamo would specialise on the call handle and compile anew for every call.
@torch.compiler.disable
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    layer: int,
    scale: float | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Append `k, v` to the trace and attend: query token at position p of a row sees its columns 0 … p.

    Gradients reach `q, k, v` of this call and of every earlier call of the trace; they are first-order only.
    Running a call's layer again (activation checkpointing, non-reentrant) rewrites the same columns.

    Args:
        q: `[total, num_heads, head_dim]`, rotated, unless `position_embeddings` are given.
        k, v: `[total, num_kv_heads, head_dim]`, keys like queries; `num_heads` is a multiple of `num_kv_heads`.
        call: from :meth:`KVTrace.open`; `total` is its number of new tokens.
        layer: which of the trace's layers.
        scale: of the scores; default `head_dim ** -0.5`.
        position_embeddings: `(cos, sin)`, `[1, total, R]` each, as transformers' rotary modules give them (their
            scaling included): `q` and `k` come un-rotated, and turning them and appending are one operation. The
            first R/2 entries of a token are its pairs'; dims from R on do not turn. In the dtype of `q` or its
            accumulation dtype; no gradient reaches them.
        interleaved: dims `(2d, 2d + 1)` turn together, otherwise `(d, d + R/2)`.

    Returns:
        `[total, num_heads, head_dim]` in the dtype of `q`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit the call, each named.
    """
    _check(q, k, v, call, layer)
    turns = None if position_embeddings is None else (*_turns(*position_embeddings, q), interleaved)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    order = call.enter(layer)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, order))
    if needs_grad:
        out, order = _CachedAttention.apply(q, k, v, order, call, layer, scale, turns)
    else:
        out = _forward(q, k, v, call, layer, scale, turns)[1]
    call.leave(layer, order)
    return out


def _forward(q, k, v, call, layer, scale, turns) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, output and log-sum-exp."""
    keys, values = call.storage.keys[layer], call.storage.values[layer]
    rows = (call.q_begin, call.q_end, call.starts)
    if turns is not None:
        append = backends.functions("rotary_append", q, call.implementation).rotary_append
        q, k, v = append(q, k, v, *turns, keys, values, *rows, call.max_new), None, None
    if call.attend is not None:
        return q, *call.attend(q, k, v, layer, scale)
    attend = backends.functions("cached_attention", q, call.implementation, many=call.run is None).cached_attention
    return q, *attend(q, k, v, keys, values, *rows, call.max_new, call.max_kv, scale)


class _CachedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, order, call, layer, scale, turns):
        q, out, lse = _forward(q, k, v, call, layer, scale, turns)
        ctx.save_for_backward(q, out, lse, *(turns or ())[:2])
        ctx.call, ctx.layer, ctx.scale, ctx.interleaved = call, layer, scale, turns and turns[2]
        ctx.set_materialize_grads(False)
        return out, order.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        q, out, lse, *turns = ctx.saved_tensors
        # Only later calls may have used this one: its own queries then owe nothing.
        grad_out = torch.zeros_like(out) if grad_out is None else _unit_stride(grad_out)
        grad_q, grad_k, grad_v = ctx.call.gradients.backward(ctx.call, ctx.layer, grad_out, q, out, lse, ctx.scale)
        if turns:
            turn_back = backends.functions("rotary_append", q, ctx.call.implementation).rotary_backward
            grad_q, grad_k = turn_back(grad_q, grad_k, *turns, ctx.interleaved)
        return grad_q, grad_k, grad_v, *[None] * 5


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, call: Call, layer: int) -> None:
    num_layers, _, num_kv_heads, _, head_dim = call.storage.keys.shape
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer is {layer}; allowed: 0 … {num_layers - 1}, the layers of the trace")
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
        if tensor.dtype != call.storage.keys.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; allowed: {call.storage.keys.dtype}, the trace's dtype")
        if tensor.device != call.storage.keys.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {call.storage.keys.device}, the trace's device")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; allowed: 1")


def _turns(cos: Tensor, sin: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's pairs, `[total, R/2]`."""
    total, _, head_dim = q.shape
    acc = accumulation_dtype(q.dtype)
    for name, tensor in (("cos", cos), ("sin", sin)):
        size = tensor.shape[-1]
        if tuple(tensor.shape) != (1, total, cos.shape[-1]) or size % 2 or size > head_dim:
            raise ValueError(
                f"{name} of position_embeddings has shape {tuple(tensor.shape)}; allowed: [1, {total}, R], the same "
                f"for both, with R even and ≤ {head_dim}, the head_dim"
            )
        if tensor.dtype not in (q.dtype, acc) or tensor.dtype != cos.dtype:
            allowed = " or ".join(dict.fromkeys(map(str, (q.dtype, acc))))
            raise TypeError(f"{name} of position_embeddings is {tensor.dtype}; allowed: {allowed}, the same for both")
        if tensor.device != q.device:
            raise ValueError(f"{name} of position_embeddings is on {tensor.device}; allowed: {q.device}, as q")
    return tuple(_unit_stride(x.detach())[0, :, : x.shape[-1] // 2] for x in (cos, sin))
