"""From a hidden state to the embedding expected of the token that would follow: attention over the vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas_ops import backends
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.expected_embedding.reference import expected_embedding_backward_weights


def expected_embedding(
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`softmax(z / temperature) @ values` with `z = scale · (hidden @ keysᵀ + bias)`, the logits of a model's head.

    Keys and values are streamed once, by an online softmax: no logit or probability of a whole vocabulary is kept,
    forward or backward. Differentiable in every tensor; what keys, values and bias cost is spent only where they train.

    Args:
        hidden: `[rows, hidden_size]`.
        keys: `[vocab, hidden_size]`, the head's weight; `values`: `[vocab, embedding_size]`, tokens as inputs; both of
            the dtype of `hidden`, and possibly one tensor.
        bias: `[vocab]`, the head's.
        temperature: > 0; a tensor of one element, where it is trained.
        scale: of logits. softcap: they are `softcap · tanh(z / softcap)` then.

    Returns:
        `[rows, embedding_size]` in the dtype of `hidden`; computed in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or number that does not fit, named.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; allowed: [rows, hidden_size]")
    if keys.dim() != 2 or keys.shape[0] < 1 or keys.shape[1] != hidden.shape[1]:
        raise ValueError(f"keys has shape {tuple(keys.shape)}; allowed: [vocab, {hidden.shape[1]}]")
    if values.dim() != 2 or values.shape[0] != keys.shape[0]:
        raise ValueError(f"values has shape {tuple(values.shape)}; allowed: [{keys.shape[0]}, embedding_size]")
    if bias is not None and tuple(bias.shape) != (keys.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; allowed: [{keys.shape[0]}]")
    for name, tensor in {"keys": keys, "values": values, "bias": bias}.items():
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} is {tensor.dtype}; allowed: {hidden.dtype}, the dtype of hidden")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {hidden.device}, the device of hidden")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap is {softcap}; allowed: above 0 and finite, or None")
    acc = accumulation_dtype(hidden.dtype)
    if not isinstance(temperature, Tensor):
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature is {temperature}; allowed: above 0 and finite")
        # Filled in on the device: a copy from the host could not be captured in a CUDA graph.
        temperature = torch.full((1,), temperature, dtype=acc, device=hidden.device)
    if temperature.numel() != 1:
        raise ValueError(f"temperature has shape {tuple(temperature.shape)}; allowed: one element")
    temperature = temperature.reshape(1).to(hidden.device, acc)
    return _ExpectedEmbedding.apply(
        hidden.contiguous(), keys.contiguous(), values.contiguous(), bias, temperature, float(scale), softcap, backend
    )


class _ExpectedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, keys, values, bias, temperature, scale, softcap, backend):
        ops = backends.functions("expected_embedding", hidden, backend)
        out, lse = ops.expected_embedding(hidden, keys, values, bias, temperature, scale, softcap)
        ctx.save_for_backward(hidden, keys, values, bias, temperature, out, lse)
        ctx.logits, ctx.ops = (scale, softcap), ops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        given = grad_out.contiguous(), *ctx.saved_tensors, *ctx.logits
        need_hidden, need_keys, need_values, need_bias, need_temperature = ctx.needs_input_grad[:5]
        grads = [None] * 5
        if need_hidden or need_temperature:
            grads[0], grads[4] = ctx.ops.expected_embedding_backward(*given)
        if need_keys or need_values or need_bias:
            # Bound by two products with as many rows as the vocabulary: nothing to gain over PyTorch's own.
            grads[1:4] = expected_embedding_backward_weights(*given)
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None
