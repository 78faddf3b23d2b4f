"""How large the gradient is at every latent step of a training: where it vanishes, or grows, on its way back."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TrainerCallback

from diffmas.agents.latent_rollouts import step_by_step
from diffmas.runs.metrics import LATENT_NORMS
from diffmas.system import MultiAgentSystem


class LatentGradients(TrainerCallback):
    """Norms of the gradient of every latent step's input, over a micro-batch's rows, while a training runs.

    Of steps that are taken one by one with their gradient; none for sweeps, captured rollouts or cut traces, nor where
    the loss is scaled (float16). Of several processes, each sees its own.
    """

    def __init__(self, system: MultiAgentSystem):
        self._alignments = [model.alignment for model in system.models.values()]
        self._steps = system.latent_steps
        self._agents = len(system.topology.agents) - 1
        self._seen = self._steps and self._agents and system.trajectory.latent_rollout is step_by_step
        self._calls = 0
        self._squares: Tensor | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self._seen and not args.fp16:
            self._handles = [alignment.register_forward_hook(self._watch) for alignment in self._alignments]

    def on_train_end(self, args, state, control, **kwargs):
        if self._seen and not args.fp16:
            for handle in self._handles:
                handle.remove()

    def _watch(self, alignment, arguments, aligned: Tensor) -> None:
        if not (torch.is_grad_enabled() and aligned.requires_grad):
            return
        at, self._calls = self._calls % (self._agents * self._steps), self._calls + 1
        if self._squares is None:
            self._squares = aligned.new_zeros(2, self._agents * self._steps, dtype=torch.float64)
        squares = self._squares

        def arrive(gradient: Tensor) -> None:
            squares[0, at] += gradient.double().square().sum()
            squares[1, at] += 1

        aligned.register_hook(arrive)

    def take(self) -> dict[str, list[list[float]]]:
        """`{LATENT_NORMS: [agent][step]}`, root mean squares over micro-batches since last asked; {} for none."""
        if self._squares is None:
            return {}
        squares, count = self._squares
        self._squares = None
        norms = (squares / count.clamp_min(1)).sqrt()
        return {LATENT_NORMS: norms.view(self._agents, self._steps).tolist()}
