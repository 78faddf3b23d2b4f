"""A training stops at the first step whose loss, gradient or weights are not finite, in all processes at once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from diffmas.support.distributed import any_process, gathered, process, processes, whole

#: What is found, causes first.
_LOSS, _GRADIENT, _WEIGHT = range(3)


class NotFiniteError(ArithmeticError):
    """Something that has to be a number is NaN or infinite."""


class FiniteSteps(TrainerCallback):
    """Looks at every step before its update and after it.

    The losses are looked at together, where the gradients are complete: several processes have to stop at the same
    place, and the device is waited for once.
    """

    def __init__(self):
        self._losses: list[Tensor] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._losses = []

    def add(self, loss: Tensor) -> None:
        """Remember the loss of a micro-batch (a scalar)."""
        self._losses.append(loss.detach())

    def check_gradients(self, norm: Tensor | float, step: int, device: torch.device) -> None:
        """Raise `NotFiniteError` for a loss of the step, or its gradient norm, that is not finite."""
        # All processes ask for it, whatever their own losses are.
        norm = float(whole(norm) if isinstance(norm, Tensor) else norm)
        values = torch.stack(self._losses).tolist()
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        found = None
        if bad is not None:
            found = _LOSS, f"the loss of micro-batch {bad + 1} of {len(values)} is {values[bad]}"
        elif not math.isfinite(norm):
            found = _GRADIENT, f"the gradient norm is {norm}"
        _stop_together(found, step, "before its update", device)

    def on_optimizer_step(self, args, state, control, model: nn.Module, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        bad = next((n for n, good in zip(trained, _finite(trained.values()), strict=True) if not good), None)
        found = None if bad is None else (_WEIGHT, f"{bad} is not finite after the update")
        _stop_together(found, state.global_step + 1, "before it was saved", args.device)


@torch.no_grad()
def _finite(parameters: Iterable[Tensor]) -> list[bool]:
    """Of this process's shards; the device is waited for once."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return torch.stack([p.isfinite().all() for p in local]).tolist()


def _stop_together(found: tuple[int, str] | None, step: int, when: str, device: torch.device) -> None:
    if not any_process(found is not None, device):
        return
    # Gradients are shared: every process finds in them what a loss in one of them has done.
    _, failed, what = min((kind, p, what) for p, (kind, what) in gathered([(process(), found)] if found else []))
    where = f" in process {failed}" if processes() > 1 else ""
    raise NotFiniteError(
        f"step {step}: {what}{where}; stopped {when}, checkpoints of earlier steps are left as they are (a smaller "
        "learning_rate or max_grad_norm may help)"
    )
