"""LoRA's linear layers as one autograd node each.

PEFT's forward is some ten small operations. On a latent step, one token a row, their overhead and their saved
intermediates cost more than the arithmetic.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffmas_ops import few_rows_matmul


def fuse_lora(model: nn.Module) -> None:
    """Run the LoRA layers inside `model` as one operation wherever they are plain.

    A layer is left to PEFT, call by call, while it is anything else: adapters disabled, merged or several, dropout,
    a variant such as DoRA, a quantised or hooked base layer, mixed dtypes, autocast. Parameters and checkpoints stay
    PEFT's own.
    """
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.forward = types.MethodType(_forward, module)


def _forward(self: Linear, x: Tensor, *args, **kwargs) -> Tensor:
    base, name = self.base_layer, self.active_adapters[0]
    if not args and not kwargs and _is_plain(self, base, name, x):
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraLinear.apply(x, base.weight, base.bias, a, b, self.scaling[name])
    return Linear.forward(self, x, *args, **kwargs)


def _is_plain(layer: Linear, base: nn.Linear, name: str, x: Tensor) -> bool:
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or name not in layer.lora_A:
        return False
    a, b = layer.lora_A[name], layer.lora_B[name]
    return (
        name not in layer.lora_variant
        and type(layer.lora_dropout[name]) is nn.Identity
        and x.dtype == base.weight.dtype == a.weight.dtype
        and b.bias is None
        and not torch.is_autocast_enabled(x.device.type)
        and not base._forward_hooks
        and not base._forward_pre_hooks
    )


class _LoraLinear(torch.autograd.Function):
    """`y = x Wᵀ + bias + s (x Aᵀ) Bᵀ` with `x [..., in]`, `W [out, in]`, `A [r, in]`, `B [out, r]`."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.T
        y = few_rows_matmul(rows, weight, True) if bias is None else F.linear(rows, weight, bias)
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, low, weight, a, b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
        shape = (*grad.shape[:-1], rows.shape[1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad @ b).mul_(ctx.scaling)
        return (
            few_rows_matmul(grad, weight, False).addmm_(grad_low, a).view(shape) if need_x else None,
            grad.T @ rows if need_weight else None,
            grad.sum(0) if need_bias else None,
            grad_low.T @ rows if need_a else None,
            (grad.T @ low).mul_(ctx.scaling) if need_b else None,
            None,
        )
