"""Latent rollouts differentiated in parallel over their steps, by sweeps (`latent_backward = "sweeps:k"`).

A latent rollout is sequential forward, since `eₜ = align(hₜ₋₁)`. Once it is finished its inputs are known, and one call
over all of e₁ … e_m writes the same keys and values and gives the same hidden states, up to rounding. Let b be the
gradient that reaches the inputs through the keys and values later calls attend to, and M the Jacobian of
`(e₁ … e_m) → (align(h₀) … align(h_m₋₁))`. The gradient of the inputs solves

    λ = b + Mᵀ λ.

hₜ depends on e₁ … eₜ only, so M is strictly lower block-triangular and Mᵐ = 0: the iteration `λⱼ = b + Mᵀ λⱼ₋₁` from
`λ₀ = 0` ends at λ after m steps. Each is a sweep, one backward of the parallel call; `λₖ = Σ_{i<k} (Mᵀ)ⁱ b` leaves out
the paths of k or more hops from a latent step to a later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas.agents.latent_rollouts import LatentRollout, step_by_step, take_steps
from diffmas.models.agent_model import AgentModel
from diffmas_ops import Call, KVTrace


def latent_rollout(latent_backward: str) -> LatentRollout:
    """The latent rollout whose backward is "exact" or "sweeps:k"."""
    kind, _, sweeps = latent_backward.partition(":")
    if latent_backward == "exact":
        return step_by_step
    if kind != "sweeps" or not sweeps.isdecimal() or int(sweeps) < 1:
        raise ValueError(f"latent_backward is {latent_backward!r}; allowed: exact, or sweeps:k with an integer k ≥ 1")
    return Sweeps(int(sweeps))


@dataclass(frozen=True)
class Sweeps:
    """A latent rollout with `sweeps` parallel backward passes: exact from m on, truncated below.

    The steps are taken without recording, then one call over all of them writes their columns of the trace again, so
    that the trace holds what is differentiated. The prompt's call is left alone: h₀ is recorded there, and only the m
    latent tokens run twice.

    All sweeps but the last are rehearsals: they give `Mᵀ λⱼ₋₁ + b` and touch nothing else. The last one is the ordinary
    backward of the call, from `λₖ₋₁` at the aligned hidden states: it takes the gradients of parameters and of older
    columns once, and leaves the gradient λₖ of e₁ with h₀. What reaches the hidden states themselves, where somebody is
    handed them, is part of b.
    """

    sweeps: int

    def __call__(self, model: AgentModel, steps: int, trace: KVTrace, hidden: Tensor) -> Sequence[Tensor]:
        first = model.alignment(hidden)
        if steps == 1 or not (torch.is_grad_enabled() and first.requires_grad):
            return step_by_step(model, steps, trace, hidden)
        begin = trace.host_lengths
        with torch.no_grad():
            rest = take_steps(model, steps, trace, hidden)[0][1:]
        trace.rewind(begin)
        call = trace.open(steps)
        # Packed row by row, a row's steps in order.
        inputs = torch.stack([first, *rest], dim=1)
        width = inputs.shape[2]
        outputs = model.read(trace, call, inputs_embeds=inputs.view(-1, width)).view_as(inputs)
        aligned = model.alignment(outputs[:, :-1].reshape(-1, width)).view(*outputs[:, :-1].shape)
        rehearsals = min(self.sweeps, steps) - 1
        token = trace.order.token
        solve = _Rehearsals(rehearsals, call, token, inputs, outputs, aligned)
        trace.order.token, states = _Solve.apply(token, outputs, aligned, solve)
        return states.unbind(1)


@dataclass(frozen=True)
class _Rehearsals:
    """Sweeps over the graph from `order`, `outputs` and `aligned`, what a call of several tokens left, to its `inputs`.

    `inputs [batch, m, hidden]` are e₁ … e_m, `outputs`, alike, h₁ … h_m, and `aligned [batch, m - 1, hidden]` are
    align(h₁) … align(h_m₋₁).
    """

    number: int
    call: Call
    order: Tensor
    inputs: Tensor
    outputs: Tensor
    aligned: Tensor

    def run(self, handed: Tensor | None) -> Tensor | None:
        """λ at e₂ … e_m, which is the gradient of `aligned`; None (zero) without a rehearsal.

        `handed`: the gradient that reaches `outputs` from whoever was handed them.
        """
        # From the order token, autograd reaches the attention of every layer and with it b.
        pairs, solution = [(self.order, torch.zeros_like(self.order))], None
        if handed is not None:
            pairs.append((self.outputs, handed))
        with self.call.rehearse():
            for _ in range(self.number):
                more = [] if solution is None else [(self.aligned, solution)]
                reached, arriving = zip(*pairs, *more, strict=True)
                (gradient,) = torch.autograd.grad(reached, self.inputs, arriving, retain_graph=True)
                solution = gradient[:, 1:]
        return solution


class _Solve(torch.autograd.Function):
    """Stands behind the parallel call in the order of calls: when its turn comes, b is complete."""

    @staticmethod
    def forward(ctx, order, outputs, aligned, rehearsals):
        ctx.rehearsals = rehearsals
        ctx.set_materialize_grads(False)
        return order.new_empty(0), outputs.view_as(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, _, handed):
        return None, handed, ctx.rehearsals.run(handed), None
