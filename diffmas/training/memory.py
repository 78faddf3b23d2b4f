"""How much memory a training trajectory takes at most: counted for the trace, fitted for the activations.

Bytes of a trace, of its gradient accumulators and of a chunk of logits follow from lengths and the model's
configuration. What autograd keeps for a token depends on the model's code, adapters, dtypes and kernels, but is
proportional to the tokens: three small trajectories of the system at hand tell it.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffmas.agents.costs import Call, Lengths, Plan, Shape
from diffmas.agents.positions import position_limit
from diffmas.models.loss import chunk_tokens, token_bytes
from diffmas.models.recurrent import chunk_length
from diffmas.support.quiet import quiet_profiler
from diffmas.system import MultiAgentSystem

#: Latent steps that the trajectories that are measured take at most.
_STEPS = 4
#: Their rows, lengths of prompts and answer, and latent steps.
_SAMPLES = ((1, 16, _STEPS), (1, 64, _STEPS), (4, 16, _STEPS))


def measure(run: Callable[[], Any], device: torch.device | str) -> tuple[Any, int, int]:
    """`run()`, the bytes it left allocated, and the most it had allocated at once; both beyond what was there before.

    On CUDA the allocator's own statistics (its peak is reset), elsewhere the profiler's record of allocations.
    """
    # Cycles left over from before must not be released in between.
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    quiet_profiler()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    # torch has no public reader of allocations and releases in their order.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, held, peak


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a trajectory's forward and backward, beyond weights and optimizer state, in bytes.

    Attributes:
        column, accumulator: of a trace's column and of its gradient, over all layers; of several models, the least.
        read, latent: what a token that is read, or a latent step of one row, leaves for the backward.
        call: what every call leaves besides, whatever its tokens.
        row, filled: what recurrent layers leave besides, of every row that reads and of every token, where rows are
            filled up to multiples of `chunk` tokens. state: what they remember of a row.
        work: what differentiating a call needs besides, a token (filled up).
        fixed: what does not grow with lengths, among it the parameters' gradients.
        logit_chunk: tokens whose logits exist at a time; `logit`: bytes of one token's.
    """

    column: int
    accumulator: int
    logit: int
    logit_chunk: int
    state: int = 0
    chunk: int = 1
    read: float = 0.0
    latent: float = 0.0
    call: float = 0.0
    row: float = 0.0
    filled: float = 0.0
    work: float = 0.0
    fixed: float = 0.0

    def saved(self, plan: Plan) -> float:
        """What is there when the forward is done: a trace that no gradient reaches is gone."""
        kept = {call.trace for call in plan.calls if call.differentiated}
        traces = self.column * sum(plan.columns[i] for i in kept) + self.state * len(plan.calls[-1].rows)
        return traces + sum(map(self._kept, plan.calls))

    def backward(self, plan: Plan) -> float:
        """The most there is in the backward; calls are differentiated last to first."""
        now, peak, reached = self.saved(plan), 0.0, set()
        for call in reversed(plan.calls):
            if not call.differentiated:
                break
            reached.add(call.trace)
            accumulators = self.accumulator * sum(plan.columns[i] for i in reached)
            peak = max(peak, now + accumulators + self.work * self.filled_up(call) / call.steps)
            now -= self._kept(call)
        return peak + self.fixed

    def peak(self, plan: Plan) -> float:
        """The most there is at any time."""
        logits = self.logit * min(self.logit_chunk, plan.answer_tokens)
        return max(self.column * sum(plan.columns), self.saved(plan) + logits, self.backward(plan))

    def _kept(self, call: Call) -> float:
        weights = (self.read, self.latent, self.call, self.row, self.filled)
        return sum(w * x for w, x in zip(weights, self.features(call), strict=True))

    def features(self, call: Call) -> list[float]:
        """What a call leaves follows from: tokens read, latent steps of rows, calls, rows that read, filled tokens."""
        if not call.differentiated:
            return [0.0] * 5
        if call.phase == "latent":
            return [0.0, call.tokens, call.steps, 0.0, 0.0]
        filled = self.filled_up(call) if self.chunk > 1 else 0.0
        return [call.tokens, 0.0, 1.0, len(call.rows) if self.state else 0.0, filled]

    def filled_up(self, call: Call) -> int:
        """Tokens, as recurrent layers take them."""
        latent = call.phase == "latent"
        return call.tokens if latent else sum(math.ceil(new / self.chunk) * self.chunk for _, new in call.rows)


def plan_of(
    system: MultiAgentSystem, prompts: Sequence[Lengths], answers: Lengths, latent_steps: int | None = None
) -> Plan:
    """The plan of a trajectory of `system`, or of one with other `latent_steps`."""
    steps = system.latent_steps if latent_steps is None else latent_steps
    return Plan.of(system.topology, steps, prompts, answers, detach_trace=system.trajectory.detach_trace)


def counted(system: MultiAgentSystem, autocast: torch.dtype | None = None) -> MemoryModel:
    """What follows from the configuration of `system` alone: a lower bound of the memory a trajectory takes."""
    model = system.agent_model.language_model
    shape, dtype = Shape.of(system.agent_model, autocast), autocast or model.dtype
    shapes = [shape, *(Shape.of(other, autocast) for other in system.other_models)]
    capped = system.agent_model.head.cap is not None
    return MemoryModel(
        column=min(s.column * s.item for s in shapes),
        accumulator=min(s.column * s.accumulator for s in shapes),
        logit=token_bytes(shape.vocab, dtype, capped),
        logit_chunk=chunk_tokens(shape.vocab, dtype, capped),
        state=system.agent_model.state_bytes,
        chunk=chunk_length(model) if system.agent_model.recurrent else 1,
    )


def calibrate(system: MultiAgentSystem, autocast: torch.dtype | None = None) -> MemoryModel:
    """The memory model of `system` with its present checkpointing, from small trajectories.

    Leaves weights, gradients and the state of random numbers as they were. `autocast`: the dtype that training computes
    in, where it is not the model's own.
    """
    bare = counted(system, autocast)
    sizes = _SAMPLES
    if bare.state:
        # Rows that fill a recurrent layer's chunks, and states that few latent steps continue, are told apart by more.
        limit = position_limit(system.agent_model.language_model) or math.inf
        longest = min(max(128, 2 * bare.chunk), limit // (len(system.topology.agents) + 1) - _STEPS)
        sizes = (_SAMPLES[0], (1, int(longest), _STEPS), *_SAMPLES[1:], (2, 16, 1))
    samples = [_Sample.measure(system, *size, autocast) for size in sizes]
    kept = torch.tensor([s.held - bare.saved(s.plan) for s in samples], dtype=torch.float64)
    features = torch.tensor([s.features(bare) for s in samples], dtype=torch.float64)
    # What there is nothing of, or always as much as of another, has no weight of its own.
    solved = torch.linalg.lstsq(features, kept[:, None], driver="gelsd").solution[:, 0].tolist()
    bare = replace(bare, **dict(zip(("read", "latent", "call", "row", "filled"), solved, strict=True)))
    over = [s.peak - bare.backward(s.plan) for s in samples[:2]]
    answers = [bare.filled_up(s.plan.calls[-1]) for s in samples[:2]]
    work = max(0.0, (over[1] - over[0]) / (answers[1] - answers[0]))
    return replace(bare, work=work, fixed=over[1] - work * answers[1])


@dataclass(frozen=True)
class _Sample:
    plan: Plan
    held: int
    peak: int

    def features(self, model: MemoryModel) -> list[float]:
        """Of all its calls together."""
        return [sum(column) for column in zip(*map(model.features, self.plan.calls), strict=True)]

    @classmethod
    def measure(
        cls, system: MultiAgentSystem, rows: int, length: int, steps: int, autocast: torch.dtype | None
    ) -> _Sample:
        device = system.agent_model.language_model.device
        vocab = system.agent_model.language_model.get_input_embeddings().weight.shape[0]
        # Rows that begin alike, as prompts do.
        ids = (torch.arange(length, device=device) % vocab).repeat(rows)
        agents = len(system.topology.agents)
        prompts = [[length] * rows] * agents
        training, whole, gradients = system.training, system.trajectory, [(p, p.grad) for p in system.parameters()]
        system.train().zero_grad(set_to_none=True)
        system.trajectory = replace(whole, latent_steps=min(whole.latent_steps, steps))
        context = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()

        def forward():
            with context:
                return system([ids] * agents, prompts, ids, [length] * rows, return_logits=False).loss

        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                loss, held, _ = measure(forward, device)
                _, _, extra = measure(loss.backward, device)
            plan = plan_of(system, prompts, [length] * rows)
        finally:
            system.train(training)
            system.trajectory = whole
            for parameter, gradient in gradients:
                parameter.grad = gradient
        return cls(plan, held, held + extra)
