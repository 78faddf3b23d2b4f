"""`latent_project` in plain PyTorch: the specification, any dtype, any device."""

import torch
from torch import Tensor

from diffmas_ops.dtypes import accumulation_dtype


def latent_project(hidden: Tensor, weight: Tensor | None, target_norm: float) -> tuple[Tensor, Tensor]:
    """`out = target_norm * y / ‖y‖` with `y = hidden @ weight`, `hidden [N, H]`; also returns `‖y‖ [N]`."""
    y = _project(hidden, weight)
    norm = y.norm(dim=-1)
    return (y * _scale(norm, target_norm)).to(hidden.dtype), norm


def latent_project_backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    out: Tensor,
    norm: Tensor,
    target_norm: float,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden` (its dtype) and, where asked for, `weight` (accumulation dtype; else empty)."""
    acc = accumulation_dtype(hidden.dtype)
    grad, unit = grad_out.to(acc), out.to(acc) / target_norm
    grad_y = (grad - unit * (unit * grad).sum(-1, keepdim=True)) * _scale(norm, target_norm)
    if weight is None:
        return grad_y.to(hidden.dtype), grad_y.new_empty(0)
    grad_weight = hidden.to(acc).T @ grad_y if need_weight else grad_y.new_empty(0)
    return (grad_y @ weight.to(acc).T).to(hidden.dtype), grad_weight


def _project(hidden: Tensor, weight: Tensor | None) -> Tensor:
    hidden = hidden.to(accumulation_dtype(hidden.dtype))
    return hidden if weight is None else hidden @ weight.to(hidden.dtype)


def _scale(norm: Tensor, target_norm: float) -> Tensor:
    return torch.where(norm > 0, target_norm / norm, 0.0).unsqueeze(-1)
