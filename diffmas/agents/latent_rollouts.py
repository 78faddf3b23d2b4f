"""How an agent takes its latent steps behind its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from diffmas.models.agent_model import AgentModel
from diffmas_ops import KVTrace

#: `rollout(model, steps, trace, hidden)` takes `steps` ≥ 1 latent steps behind what `trace` holds, starting from the
#: rows' last hidden states h₀ `[batch, hidden]`. It returns the hidden states h₁ … h_m, each `[batch, hidden]`; None
#: where it keeps them to itself.
LatentRollout = Callable[[AgentModel, int, KVTrace, Tensor], "Sequence[Tensor] | None"]


def step_by_step(model: AgentModel, steps: int, trace: KVTrace, hidden: Tensor) -> list[Tensor]:
    """One call per latent step; autograd differentiates them last to first."""
    return take_steps(model, steps, trace, hidden)[1]


def take_steps(model: AgentModel, steps: int, trace: KVTrace, hidden: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """`eₜ = align(hₜ₋₁)`, then hₜ, one call each; returns the inputs e₁ … e_m and h₁ … h_m, each `[batch, hidden]`."""
    inputs, states = [], []
    for _ in range(steps):
        inputs.append(model.alignment(hidden))
        hidden = model.read(trace, trace.one_each, inputs_embeds=inputs[-1])
        states.append(hidden)
    return inputs, states
