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
    names = self.active_adapters
    if args or kwargs or len(names) != 1 or names[0] not in self.lora_A:
        return Linear.forward(self, x, *args, **kwargs)
    base, name = self.base_layer, names[0]
    a, b = self.lora_A[name], self.lora_B[name]
    weight, low = base.weight, a.weight
    if (
        self.disable_adapters
        or self.merged
        or name in self.lora_variant
        or type(self.lora_dropout[name]) is not nn.Identity
        or not x.dtype == weight.dtype == low.dtype
        or b.bias is not None
        or torch.is_autocast_enabled(x.device.type)
        or base._forward_hooks
        or base._forward_pre_hooks
    ):
        return Linear.forward(self, x)
    return _LoraLinear.apply(x, weight, base.bias, low, b.weight, self.scaling[name])


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
        # beta = 0 ignores what is added to: a scaled product in one operation.
        grad_low = torch.addmm(low, grad, b, beta=0, alpha=ctx.scaling)
        return (
            few_rows_matmul(grad, weight, False).addmm_(grad_low, a).view(shape) if need_x else None,
            grad.T @ rows if need_weight else None,
            grad.sum(0) if need_bias else None,
            grad_low.T @ rows if need_a else None,
            torch.addmm(b, grad.T, low, beta=0, alpha=ctx.scaling) if need_b else None,
            None,
        )
