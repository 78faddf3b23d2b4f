"""`merge_states` in plain PyTorch: the specification, any dtype, any device."""

import torch
from torch import Tensor


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over S disjoint key sets: `outs [S, T, H, D]`, `lses [S, T, H]` (natural log).

    A set with `lse = -inf` contributes nothing, whatever its `out` holds; with no key at all the result is 0.
    """
    lse = torch.logsumexp(lses, dim=0)
    weight = torch.where(lses == -torch.inf, 0.0, torch.exp(lses - lse)).unsqueeze(-1)
    out = torch.where(weight > 0, weight * outs.to(weight.dtype), 0.0).sum(0)
    return out.to(outs.dtype), lse
