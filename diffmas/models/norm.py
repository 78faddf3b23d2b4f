"""Root-mean-square norms as one autograd node each (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from diffmas.models.in_place import is_from, replace_forward

_TRANSFORMERS = "transformers.models."


def fuse_norms(model: nn.Module) -> None:
    """Run the RMS norms inside `model` as one operation on float32 inputs; other dtypes keep the model's own.

    Which of transformers' norms are of the usual kind is found by trying: their own forward decides. It says nothing of
    anybody else's, which may have more parameters that do nothing yet.
    """
    for module in model.modules():
        if "forward" not in vars(module) and _is_rms_norm(module):
            replace_forward(module, _forward)


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    if x.dtype == self.weight.dtype == torch.float32 and is_from(type(self), _TRANSFORMERS):
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)
    return type(self).forward(self, x)


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not is_from(type(module), _TRANSFORMERS):
        return False
    if not hasattr(module, "variance_epsilon"):
        return False
    if weight is None or weight.dim() != 1 or weight.dtype != torch.float32 or weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.numel(), generator=generator).to(weight.device)
    return torch.allclose(module(x), _RMSNorm.apply(x, weight, module.variance_epsilon), atol=1e-5)


class _RMSNorm(torch.autograd.Function):
    """`y = w x / sqrt(mean(x²) + ε)` over the last dimension."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(epsilon).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        unit, inverse, weight = ctx.saved_tensors
        grad_weight = (grad * unit).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad_unit = grad * weight
        mean = (grad_unit * unit).mean(-1, keepdim=True)
        return grad_unit.addcmul_(unit, mean, value=-1).mul_(inverse), grad_weight, None
