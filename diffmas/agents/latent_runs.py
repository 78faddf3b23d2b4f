"""How an agent takes its latent steps behind its prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from diffmas_ops import KVTrace

if TYPE_CHECKING:
    from diffmas.system import MultiAgentSystem

#: `run(system, trace, hidden)` takes `system.latent_steps` ≥ 1 latent steps behind what `trace` holds, starting from
#: the rows' last hidden states h₀ `[batch, hidden]`, and returns their inputs e₁ … e_m, each `[batch, hidden]`.
LatentRun = Callable[["MultiAgentSystem", KVTrace, Tensor], list[Tensor]]


def step_by_step(system: MultiAgentSystem, trace: KVTrace, hidden: Tensor) -> list[Tensor]:
    """One call per latent step: `eₜ = align(hₜ₋₁)`, then hₜ; autograd differentiates them last to first."""
    inputs = []
    for _ in range(system.latent_steps):
        inputs.append(system.alignment(hidden))
        hidden = system.read(trace, trace.one_each, inputs_embeds=inputs[-1])
    return inputs
