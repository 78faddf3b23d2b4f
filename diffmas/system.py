"""Agents that talk through their traces: one differentiable trajectory over a batch of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from diffmas.agents.captured_runs import CapturedRuns, asks_for_graphs
from diffmas.agents.controls import Control
from diffmas.agents.positions import check_positions
from diffmas.agents.sweeps import latent_run
from diffmas.agents.topology import Topology
from diffmas.agents.trajectory import Trajectory
from diffmas.generation import Completion, Decoding, Event, engine
from diffmas.models.agent_model import AgentModel, Lengths
from diffmas.models.loss import plain_loss
from diffmas_ops import KVTrace


@dataclass
class TrajectoryOutput(ModelOutput):
    """Loss and logits of the answer.

    Attributes:
        loss: cross-entropy summed over all answer tokens, divided by their number (or by `num_items_in_batch`).
        logits: `[answer tokens, vocab]`, packed; row i predicts answer token i. None where they were not asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class MultiAgentSystem(nn.Module):
    """Agents on one shared language model, connected by a topology (DiffMAS, arXiv 2604.21794).

    Every agent reads its prompt, then takes latent steps: its last hidden state, aligned and rescaled, is its next
    input. Receivers attend to the keys and values their senders wrote, and the loss on the last agent's answer
    flows back through all of them.

    Args:
        model: a transformers causal language model, possibly inside PEFT; agents share it.
        topology: who hands over to whom, and what.
        latent_steps: m ≥ 0, for every agent but the last.
        alignment: "identity", "ridge" or "learned"; `alignment_initial`: what a learned one starts at.
        detach_trace: cut the gradient at every hand-over; only the last agent's own forward is differentiated.
        latent_backward: "exact", or "sweeps:k": the gradient of each latent run by k parallel backward passes
            (:class:`diffmas.agents.sweeps.Sweeps`).
        cuda_graphs: "off", or "auto": latent runs and their backward replay as CUDA graphs on a GPU
            (:class:`diffmas.agents.captured_runs.CapturedRuns`; not yet run on one).
        checkpointing: which calls recompute their activations in the backward: "none", "prefill" or "all".
        implementation: "auto", or the operators' implementation to insist on.
        loss: how the loss is taken where no logits are asked for: "auto", "chunked", "liger", "cce" or "plain", as in
            :class:`~diffmas.models.loss.AnswerLoss`.

    Raises:
        ValueError: an argument outside its range, named.
        UnsupportedModelError: a model whose attention a trace cannot express.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        *,
        latent_steps: int = 10,
        alignment: str = "identity",
        alignment_initial: str = "identity",
        detach_trace: bool = False,
        latent_backward: str = "exact",
        cuda_graphs: str = "off",
        checkpointing: str = "none",
        implementation: str = "auto",
        loss: str = "auto",
    ):
        super().__init__()
        self.agent_model = AgentModel(
            model,
            alignment=alignment,
            alignment_initial=alignment_initial,
            checkpointing=checkpointing,
            implementation=implementation,
            loss=loss,
        )
        captured = CapturedRuns() if asks_for_graphs(cuda_graphs, latent_backward) else None
        self.trajectory = Trajectory(
            self.agent_model,
            topology,
            latent_steps,
            detach_trace,
            latent_run=captured or latent_run(latent_backward),
            allocate=captured.allocate if captured else KVTrace.allocate,
        )

    @property
    def topology(self) -> Topology:
        return self.trajectory.topology

    @property
    def latent_steps(self) -> int:
        return self.trajectory.latent_steps

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate shards one by one: transformers' layers."""
        return self.agent_model.language_model._no_split_modules

    @property
    def has_unreached_parameters(self) -> bool:
        """Whether a learned Wₐ takes no part in the gradient."""
        reached = len(self.topology.agents) > 1 and self.latent_steps > 0 and not self.trajectory.detach_trace
        return self.agent_model.alignment.kind == "learned" and not reached

    def forward(
        self,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        answer_ids: Tensor,
        answer_lengths: Lengths,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
    ) -> TrajectoryOutput:
        """One whole trajectory: all agents read and think, the last one is scored on the gold answer.

        Args:
            prompt_ids: per agent in the order of `topology.agents`, int64 `[tokens]`, the rows' prompts packed.
            prompt_lengths: per agent, the rows' prompt lengths, each ≥ 1.
            answer_ids: int64 `[answer tokens]`, packed.
            answer_lengths: the rows' answer lengths, each ≥ 1.
            num_items_in_batch: what to divide the summed loss by; default the number of answer tokens.
            return_logits: without, the loss does not need the logits of all answer tokens at once.
        """
        self.trajectory.check(prompt_ids, prompt_lengths)
        rows = len(prompt_lengths[0])
        if len(answer_lengths) != rows or min(answer_lengths) < 1 or sum(answer_lengths) != answer_ids.numel():
            raise ValueError(
                f"answer_lengths is {list(answer_lengths)} for {answer_ids.numel()} tokens; allowed: "
                f"{rows} lengths ≥ 1 that sum to the number of tokens"
            )
        model = self.agent_model
        trace = self.trajectory.communicate(prompt_ids, prompt_lengths, answer_lengths).trace
        lengths = prompt_lengths[-1]
        ids = _interleave(prompt_ids[-1], lengths, answer_ids, answer_lengths)
        totals = [p + a for p, a in zip(lengths, answer_lengths, strict=True)]
        longest = max(before + more for before, more in zip(trace.host_lengths, totals, strict=True))
        check_positions(model.language_model, longest, "a training batch")
        # The tokens that predict the answer's.
        predicting = [(p - 1, p - 1 + a) for p, a in zip(lengths, answer_lengths, strict=True)]
        states = model.read(trace, totals, input_ids=ids, outputs=predicting)
        logits = model.head(states) if return_logits else None
        loss = plain_loss(logits, answer_ids) if return_logits else model.answer_loss(model.head, states, answer_ids)
        count = answer_ids.numel() if num_items_in_batch is None else num_items_in_batch
        return TrajectoryOutput(loss=loss / count, logits=logits)

    def generate(
        self,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        *,
        seeds: Sequence[int] | None = None,
        control: Control | None = None,
    ) -> list[list[Completion]]:
        """The last agent's answers, `[row][sample]`; see :class:`diffmas.generation.Engine` for the arguments."""
        return engine.generate(
            self.trajectory, prompt_ids, prompt_lengths, tokenizer, decoding, seeds=seeds, control=control
        )

    def stream(
        self,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        *,
        seeds: Sequence[int] | None = None,
        control: Control | None = None,
    ) -> Iterator[Event]:
        """The same token by token, as they come; every answer's last event carries its completion."""
        return engine.stream(
            self.trajectory, prompt_ids, prompt_lengths, tokenizer, decoding, seeds=seeds, control=control
        )


def _interleave(first: Tensor, first_lengths: Lengths, second: Tensor, second_lengths: Lengths) -> Tensor:
    """Row by row, the first packed batch's tokens and then the second's."""
    pairs = zip(first.split(list(first_lengths)), second.split(list(second_lengths)), strict=True)
    return torch.cat([part for pair in pairs for part in pair])
