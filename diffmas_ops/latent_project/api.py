"""From a hidden state to the next input embedding: align, then rescale to the norm of an embedding row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas_ops import backends
from diffmas_ops.dtypes import accumulation_dtype


def latent_project(hidden: Tensor, weight: Tensor | None, target_norm: float, *, backend: str = "auto") -> Tensor:
    """`target_norm · y / ‖y‖` with `y = hidden @ weight` (LatentMAS, arXiv 2511.20639, equation 3, rescaled).

    Args:
        hidden: `[rows, hidden_size]`.
        weight: `[hidden_size, hidden_size]` of the same dtype or, beside bfloat16 and float16, float32; or None for
            the identity. A wider weight is rounded to the dtype of `hidden`, its gradient is not.
        target_norm: ρ > 0, the mean row norm of the model's input embedding.

    Returns:
        `[rows, hidden_size]` in the dtype of `hidden`; computed in float32 (float64 for float64).
        A zero row stays zero.

    Raises:
        ValueError, TypeError: a shape, dtype, device or norm that does not fit, named.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; allowed: [rows, hidden_size]")
    size = hidden.shape[1]
    if weight is not None:
        if tuple(weight.shape) != (size, size):
            raise ValueError(f"weight has shape {tuple(weight.shape)}; allowed: [{size}, {size}]")
        if weight.dtype not in (hidden.dtype, accumulation_dtype(hidden.dtype)):
            raise TypeError(
                f"weight is {weight.dtype}; allowed: {hidden.dtype}, the dtype of hidden, or the one it adds up in"
            )
        if weight.device != hidden.device:
            raise ValueError(f"weight is on {weight.device}; allowed: {hidden.device}, the device of hidden")
        weight = weight.contiguous()
    if not target_norm > 0:
        raise ValueError(f"target_norm is {target_norm}; allowed: > 0")
    return _LatentProject.apply(hidden.contiguous(), weight, float(target_norm), backend)


class _LatentProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_norm, backend):
        ops = backends.functions("latent_project", hidden, backend)
        out, norm = ops.latent_project(hidden, _narrow(weight, hidden), target_norm)
        ctx.save_for_backward(hidden, weight, out, norm)
        ctx.target_norm, ctx.ops = target_norm, ops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        hidden, weight, out, norm = ctx.saved_tensors
        need_weight = ctx.needs_input_grad[1]
        grad_hidden, grad_weight = ctx.ops.latent_project_backward(
            grad_out.contiguous(), hidden, _narrow(weight, hidden), out, norm, ctx.target_norm, need_weight
        )
        return grad_hidden, grad_weight.to(weight.dtype) if need_weight else None, None, None


def _narrow(weight: Tensor | None, hidden: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(hidden.dtype)
