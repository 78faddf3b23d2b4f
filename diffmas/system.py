"""Agents that talk through their traces: one differentiable trajectory over a batch of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from diffmas.alignment import Alignment
from diffmas.attention import attach, rotary_of
from diffmas.capture import CapturedRuns, capture_latent_runs
from diffmas.checkpointing import ActivationCheckpointing
from diffmas.controls import Control
from diffmas.decoder_layer import fuse_layers
from diffmas.distributed import is_sharded, reach
from diffmas.generation import Completion, Decoding, Event, engine
from diffmas.latent import LatentRun
from diffmas.lora import fuse_lora
from diffmas.loss import AnswerLoss, plain_loss
from diffmas.norm import fuse_norms
from diffmas.positions import check_positions
from diffmas.sweeps import latent_run
from diffmas.topology import Agent, Topology
from diffmas_ops import Call, KVTrace, Segment, kv_concat

Lengths = Sequence[int]


@dataclass
class TrajectoryOutput(ModelOutput):
    """Loss and logits of the answer.

    Attributes:
        loss: cross-entropy summed over all answer tokens, divided by their number (or by `num_items_in_batch`).
        logits: `[answer tokens, vocab]`, packed; row i predicts answer token i. None where they were not asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class AgentState:
    """The trace an agent writes, and where in it each agent's segment stands.

    `segments[name]`: per row, the columns `begin … prompt_end` of the prompt part and `prompt_end … end` of the
    latent part.
    """

    trace: KVTrace
    segments: dict[str, tuple[list[int], list[int], list[int]]]


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
            (:class:`diffmas.sweeps.Sweeps`).
        capture: "off", or "auto": latent runs and their backward replay as CUDA graphs on a GPU
            (:class:`diffmas.capture.CapturedRuns`; not yet run on one).
        checkpointing: which calls recompute their activations in the backward: "none", "prefill" or "all".
        implementation: "auto", or the operators' implementation to insist on.
        loss: how the loss is taken where no logits are asked for: "auto", "chunked", "liger", "cce" or "plain", as in
            :class:`~diffmas.loss.AnswerLoss`.

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
        capture: str = "off",
        checkpointing: str = "none",
        implementation: str = "auto",
        loss: str = "auto",
    ):
        super().__init__()
        self.loss = AnswerLoss(loss)
        if index(latent_steps) < 0:
            raise ValueError(f"latent_steps is {latent_steps}; allowed: integers ≥ 0")
        self.model, self.topology = model, topology
        self.latent_steps, self.detach_trace, self.implementation = latent_steps, detach_trace, implementation
        base = self.language_model
        attach(base)
        fuse_lora(base)
        fuse_norms(base)
        fuse_layers(base)
        self.rotary = rotary_of(base)
        self.decode_step: engine.Step = engine.eager_step
        self.latent_run: LatentRun = latent_run(latent_backward)
        self.allocate_trace = KVTrace.allocate
        if capture_latent_runs(capture, latent_backward):
            CapturedRuns().install(self)
        self.checkpointing = ActivationCheckpointing(base, checkpointing)
        self.alignment = Alignment(
            base.get_input_embeddings().weight,
            base.get_output_embeddings().weight,
            alignment,
            initial=alignment_initial,
            implementation=implementation,
        )

    @property
    def _no_split_modules(self) -> list[str]:
        """What accelerate shards one by one: transformers' layers."""
        return self.language_model._no_split_modules

    @property
    def has_unreached_parameters(self) -> bool:
        """Whether a learned Wₐ takes no part in the gradient."""
        reached = len(self.topology.agents) > 1 and self.latent_steps > 0 and not self.detach_trace
        return self.alignment.kind == "learned" and not reached

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, without PEFT around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

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
        self._check(prompt_ids, prompt_lengths)
        rows = len(prompt_lengths[0])
        if len(answer_lengths) != rows or min(answer_lengths) < 1 or sum(answer_lengths) != answer_ids.numel():
            raise ValueError(
                f"answer_lengths is {list(answer_lengths)} for {answer_ids.numel()} tokens; allowed: "
                f"{rows} lengths ≥ 1 that sum to the number of tokens"
            )
        trace = self.communicate(prompt_ids, prompt_lengths, answer_lengths)
        lengths = prompt_lengths[-1]
        ids = _interleave(prompt_ids[-1], lengths, answer_ids, answer_lengths)
        totals = [p + a for p, a in zip(lengths, answer_lengths, strict=True)]
        longest = max(before + more for before, more in zip(trace.host_lengths, totals, strict=True))
        check_positions(self, longest, "a training batch")
        # The tokens that predict the answer's.
        predicting = [(p - 1, p - 1 + a) for p, a in zip(lengths, answer_lengths, strict=True)]
        states = self.read(trace, totals, input_ids=ids, outputs=predicting)
        head = self.language_model.get_output_embeddings()
        logits = head(states) if return_logits else None
        loss = plain_loss(logits, answer_ids) if return_logits else self.loss(head, states, answer_ids)
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
        self._check(prompt_ids, prompt_lengths)
        return engine.generate(self, prompt_ids, prompt_lengths, tokenizer, decoding, seeds=seeds, control=control)

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
        self._check(prompt_ids, prompt_lengths)
        return engine.stream(self, prompt_ids, prompt_lengths, tokenizer, decoding, seeds=seeds, control=control)

    def communicate(
        self,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        reserve: Lengths | None = None,
    ) -> KVTrace:
        """Run every agent but the last and return the trace the last one attends to, before its own prompt.

        `reserve`: columns a row to leave room for behind the last prompt; None lets the trace grow.
        """
        return self.hand_over(prompt_ids, prompt_lengths, reserve).trace

    def hand_over(
        self, prompt_ids: Sequence[Tensor], prompt_lengths: Sequence[Lengths], reserve: Lengths | None = None
    ) -> AgentState:
        """Like :meth:`communicate`, with the places of the agents' segments in the trace."""
        states: dict[str, AgentState] = {}
        agents = self.topology.agents
        lengths = dict(zip((a.name for a in agents), prompt_lengths, strict=True))
        for agent, ids in zip(agents[:-1], prompt_ids[:-1], strict=True):
            with torch.no_grad() if self.detach_trace else contextlib.nullcontext():
                state = self._receive(agent, states, lengths, reserve)
                self._write(agent, state, ids, lengths[agent.name])
            states[agent.name] = state
        received = self._receive(agents[-1], states, lengths, reserve)
        if self.detach_trace:
            received.trace.detach_()
        return received

    def read(
        self,
        trace: KVTrace,
        lengths: Lengths | Call,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        outputs: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """One call: hidden states after the final norm, `[tokens, hidden]`, of packed new tokens of every row.

        `lengths`: of the rows' new tokens, or a call that was opened on `trace` for them.
        `outputs`: per row, the range of its new tokens whose hidden states are returned; None: all.
        """
        if isinstance(lengths, Call) and outputs is not None:
            raise ValueError(f"outputs is {outputs} beside an open call; allowed: None, a call brings its own")
        call = lengths if isinstance(lengths, Call) else trace.open(lengths, outputs)
        hidden = self.run(call, input_ids=input_ids, inputs_embeds=inputs_embeds)
        if is_sharded(self) and hidden.requires_grad:
            trace.order.token = reach(trace.order.token, hidden)
        return hidden

    def run(self, call: Call, *, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Like :meth:`read`, of a call that is open already."""
        inputs = {"input_ids": input_ids[None]} if inputs_embeds is None else {"inputs_embeds": inputs_embeds[None]}
        decoder = self.language_model.get_decoder()
        with self.checkpointing.for_call(latent=inputs_embeds is not None):
            output = decoder(**inputs, position_ids=call.position_ids, use_cache=False, trace_call=call)
        hidden, wanted = output.last_hidden_state[0], call.outputs
        # A fused last layer has left the others out already.
        return hidden if wanted is None or len(hidden) == wanted.total else hidden[wanted.index]

    def _write(self, agent: Agent, state: AgentState, ids: Tensor, lengths: Lengths) -> None:
        trace = state.trace
        begin = trace.host_lengths
        hidden = self.read(trace, lengths, input_ids=ids, outputs=[(n - 1, n) for n in lengths])
        prompt_end = trace.host_lengths
        if self.latent_steps:
            self.latent_run(self, trace, hidden)
        state.segments[agent.name] = (begin, prompt_end, trace.host_lengths)

    def _receive(
        self, agent: Agent, states: dict[str, AgentState], lengths: dict[str, Lengths], reserve: Lengths | None
    ) -> AgentState:
        if (sender := self.topology.continues(agent)) is not None:
            return states[sender]
        segments, located = [], {}
        length = [0] * len(lengths[agent.name])
        for name in self.topology.ancestors(agent.name):
            holder = next(states[s] for s in agent.senders if name in states[s].segments)
            begin, prompt_end, end = holder.segments[name]
            begin = begin if self.topology.handover == "full" else prompt_end
            segments.append(Segment(holder.trace, begin, end))
            moved = [at - b for at, b in zip(length, begin, strict=True)]
            located[name] = tuple([x + by for x, by in zip(xs, moved, strict=True)] for xs in (begin, prompt_end, end))
            length = located[name][2]
        capacity = max(x + more for x, more in zip(length, self._room(agent, lengths, reserve), strict=True))
        trace_options = dict(capacity=capacity, grow=reserve is None, implementation=self.implementation)
        if segments:
            trace = kv_concat(segments, rotary=self.rotary, allocate=self.allocate_trace, **trace_options)
            return AgentState(trace, located)
        return AgentState(self._allocate(len(length), **trace_options), located)

    def _allocate(self, batch: int, **options) -> KVTrace:
        config = self.language_model.config.get_text_config(decoder=True)
        device = self.language_model.device
        autocast = torch.is_autocast_enabled(device.type)
        return self.allocate_trace(
            num_layers=config.num_hidden_layers,
            batch=batch,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=torch.get_autocast_dtype(device.type) if autocast else self.language_model.dtype,
            device=device,
            **options,
        )

    def _room(self, agent: Agent, lengths: dict[str, Lengths], reserve: Lengths | None) -> list[int]:
        """Columns a row that `agent`, and those who go on writing its trace, will add."""
        own = list(lengths[agent.name])
        if agent is self.topology.last:
            return own if reserve is None else [n + more for n, more in zip(own, reserve, strict=True)]
        own = [n + self.latent_steps for n in own]
        for heir in self.topology.agents:
            if self.topology.continues(heir) == agent.name:
                return [n + more for n, more in zip(own, self._room(heir, lengths, reserve), strict=True)]
        return own

    def _check(self, prompt_ids: Sequence[Tensor], prompt_lengths: Sequence[Lengths]) -> None:
        names = [a.name for a in self.topology.agents]
        if not len(prompt_ids) == len(prompt_lengths) == len(names):
            raise ValueError(
                f"prompt_ids has {len(prompt_ids)} and prompt_lengths {len(prompt_lengths)} entries; "
                f"allowed: one per agent ({', '.join(names)})"
            )
        for name, ids, lengths in zip(names, prompt_ids, prompt_lengths, strict=True):
            if len(lengths) != len(prompt_lengths[0]) or min(lengths, default=0) < 1 or sum(lengths) != ids.numel():
                raise ValueError(
                    f"prompt_lengths of agent {name} is {list(lengths)} for {ids.numel()} tokens; allowed: "
                    f"{len(prompt_lengths[0])} lengths ≥ 1 that sum to the number of tokens"
                )


def _interleave(first: Tensor, first_lengths: Lengths, second: Tensor, second_lengths: Lengths) -> Tensor:
    """Row by row, the first packed batch's tokens and then the second's."""
    pairs = zip(first.split(list(first_lengths)), second.split(list(second_lengths)), strict=True)
    return torch.cat([part for pair in pairs for part in pair])
