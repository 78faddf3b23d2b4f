"""A latent rollout of one's own: how an agent takes its latent steps is a function that is handed to the trajectory.

This one mixes every step's input with the one before it. It is differentiated like any other: calls through the trace
are ordinary autograd.
"""

from dataclasses import replace

import torch

from diffmas import MultiAgentSystem
from diffmas.agents.latent_rollouts import step_by_step
from diffmas.embedded import EMBEDDED_PATH
from diffmas.models.agent_model import AgentModel
from diffmas.tasks import TaskArguments, load_task
from diffmas_ops import KVTrace


def smoothed(model: AgentModel, steps: int, trace: KVTrace, hidden: torch.Tensor) -> None:
    mixed = model.alignment(hidden)
    for _ in range(steps):
        hidden = model.read(trace, trace.one_each, inputs_embeds=mixed)
        mixed = 0.5 * mixed + 0.5 * model.alignment(hidden)


def main() -> None:
    torch.manual_seed(0)
    task = load_task(TaskArguments(task="relay:slots=4", eval_size=4))
    system = MultiAgentSystem(EMBEDDED_PATH, "relay", prompts=task.prompts, latent_steps=4)
    batch = system.collator([task.eval[i] for i in range(4)])
    for run in (step_by_step, smoothed):
        system.trajectory = replace(system.trajectory, latent_rollout=run)
        system.zero_grad()
        loss = system(**batch).loss
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in system.parameters() if p.grad is not None]).norm()
        print(f"{run.__name__}: loss {loss.item():.3f}, gradient norm {norm.item():.3f}")


if __name__ == "__main__":
    main()
