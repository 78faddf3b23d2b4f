"""How much memory a training trajectory takes at most: counted for the trace, fitted for the activations.

Bytes of a trace, of its gradient accumulators and of a chunk of logits follow from lengths and the model's
configuration. What autograd keeps for a token depends on the model's code, adapters, dtypes and kernels, but is
proportional to the tokens: three small trajectories of the system at hand tell it.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffmas.agents.costs import Call, Lengths, Plan, Shape
from diffmas.agents.positions import position_limit
from diffmas.models.agent_model import AgentModel
from diffmas.models.loss import chunk_tokens, token_bytes
from diffmas.models.recurrent import chunk_length
from diffmas.support.quiet import quiet_profiler
from diffmas.system import MultiAgentSystem

#: Of the trajectories that are measured: latent steps at most, and lengths of prompts.
_STEPS, _SHORT, _LONG = 4, 16, 64


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
class ModelMemory:
    """What calls of one model, and the traces that it writes, take, in bytes.

    Attributes:
        column, accumulator: of a trace's column and of its gradient, over all layers.
        read, latent: what a token that is read, or a latent step of one row, leaves for the backward.
        call: what every call leaves besides, whatever its tokens.
        row, filled: what recurrent layers leave besides, of every row that reads and of every token, where rows are
            filled up to multiples of `chunk` tokens. state: what they remember of a row.
        work: what differentiating a call needs besides, a token (filled up).
    """

    column: int
    accumulator: int
    state: int = 0
    chunk: int = 1
    read: float = 0.0
    latent: float = 0.0
    call: float = 0.0
    row: float = 0.0
    filled: float = 0.0
    work: float = 0.0

    def kept(self, call: Call) -> float:
        """What a call leaves for the backward."""
        weights = (getattr(self, name) for name in _FITTED)
        return sum(w * x for w, x in zip(weights, self.features(call), strict=True))

    def features(self, call: Call) -> list[float]:
        """What a call leaves follows from: tokens read, latent steps of rows, calls, rows that read, filled tokens."""
        if not call.differentiated:
            return [0.0] * len(_FITTED)
        if call.phase == "latent":
            return [0.0, call.tokens, call.steps, 0.0, 0.0]
        filled = self.filled_up(call) if self.chunk > 1 else 0.0
        return [call.tokens, 0.0, 1.0, len(call.rows) if self.state else 0.0, filled]

    def filled_up(self, call: Call) -> int:
        """Tokens, as recurrent layers take them."""
        latent = call.phase == "latent"
        return call.tokens if latent else sum(math.ceil(new / self.chunk) * self.chunk for _, new in call.rows)


#: Of a :class:`ModelMemory`, what is fitted to :meth:`ModelMemory.features`.
_FITTED = ("read", "latent", "call", "row", "filled")


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a trajectory's forward and backward, beyond weights and optimizer state, in bytes.

    Attributes:
        models: by the topology's names, the last agent's first.
        logit_chunk: tokens whose logits exist at a time; `logit`: bytes of one token's.
        fixed: what does not grow with lengths, among it the parameters' gradients.
    """

    models: Mapping[str, ModelMemory]
    logit: int
    logit_chunk: int
    fixed: float = 0.0

    def of(self, plan: Plan, trace: int) -> ModelMemory:
        """Of the model that writes a trace of `plan`."""
        return self.models[plan.models[trace]]

    def traces(self, plan: Plan, which: Iterable[int] | None = None) -> int:
        """Of all traces, or of some: their columns, and what recurrent layers remember."""
        rows, which = len(plan.calls[-1].rows), range(len(plan.columns)) if which is None else which
        return sum(self.of(plan, i).column * plan.columns[i] + self.of(plan, i).state * rows for i in which)

    def saved(self, plan: Plan) -> float:
        """What is there when the forward is done: a trace that no gradient reaches is gone."""
        kept = {call.trace for call in plan.calls if call.differentiated}
        return self.traces(plan, kept) + sum(self.of(plan, call.trace).kept(call) for call in plan.calls)

    def backward(self, plan: Plan) -> float:
        """The most there is in the backward."""
        peaks = (there + self.of(plan, call.trace).work * n for call, n, there in self.differentiated(plan))
        return max(peaks) + self.fixed

    def differentiated(self, plan: Plan) -> Iterator[tuple[Call, float, float]]:
        """Calls, last to first as the backward takes them; tokens of each at a time, and what there is at its turn."""
        now, reached = self.saved(plan), set()
        for call in reversed(plan.calls):
            if not call.differentiated:
                break
            reached.add(call.trace)
            model = self.of(plan, call.trace)
            accumulators = sum(self.of(plan, i).accumulator * plan.columns[i] for i in reached)
            yield call, model.filled_up(call) / call.steps, now + accumulators
            now -= model.kept(call)

    def peak(self, plan: Plan) -> float:
        """The most there is at any time."""
        logits = self.logit * min(self.logit_chunk, plan.answer_tokens)
        return max(self.traces(plan), self.saved(plan) + logits, self.backward(plan))


def plan_of(
    system: MultiAgentSystem, prompts: Sequence[Lengths], answers: Lengths, latent_steps: int | None = None
) -> Plan:
    """The plan of a trajectory of `system`, or of one with other `latent_steps`."""
    steps = system.latent_steps if latent_steps is None else latent_steps
    return Plan.of(system.topology, steps, prompts, answers, detach_trace=system.trajectory.detach_trace)


def counted(system: MultiAgentSystem, autocast: torch.dtype | None = None) -> MemoryModel:
    """What follows from the configuration of `system` alone: a lower bound of the memory a trajectory takes."""
    last = system.agent_model
    dtype, capped = autocast or last.language_model.dtype, last.head.cap is not None
    vocab = Shape.of(last, autocast).vocab
    models = {name: _counted(model, autocast) for name, model in system.models.items()}
    return MemoryModel(models, token_bytes(vocab, dtype, capped), chunk_tokens(vocab, dtype, capped))


def _counted(model: AgentModel, autocast: torch.dtype | None) -> ModelMemory:
    shape = Shape.of(model, autocast)
    return ModelMemory(
        column=shape.column * shape.item,
        accumulator=shape.column * shape.accumulator,
        state=model.state_bytes,
        chunk=chunk_length(model.language_model) if model.recurrent else 1,
    )


def calibrate(system: MultiAgentSystem, autocast: torch.dtype | None = None) -> MemoryModel:
    """The memory model of `system` with its present checkpointing, from small trajectories.

    Leaves weights, gradients and the state of random numbers as they were. `autocast`: the dtype that training computes
    in, where it is not the model's own.
    """
    bare = counted(system, autocast)
    samples = [_Sample.measure(system, *size, autocast) for size in _sizes(system, bare)]
    kept = torch.tensor([s.held - bare.saved(s.plan) for s in samples], dtype=torch.float64)
    features = torch.tensor([s.features(bare) for s in samples], dtype=torch.float64)
    # What there is nothing of, or always as much as of another, has no weight of its own.
    solved = torch.linalg.lstsq(features, kept[:, None], driver="gelsd").solution[:, 0]
    fitted = dict(zip(bare.models, solved.view(-1, len(_FITTED)).tolist(), strict=True))
    models = {n: replace(m, **dict(zip(_FITTED, fitted[n], strict=True))) for n, m in bare.models.items()}
    bare = replace(bare, models=models)
    # The answer's call is differentiated first: two lengths of it tell what grows with it and what does not.
    (last, model), *others = models.items()
    over = [s.peak - bare.backward(s.plan) for s in samples[:2]]
    answers = [model.filled_up(s.plan.calls[-1]) for s in samples[:2]]
    work = max(0.0, (over[1] - over[0]) / (answers[1] - answers[0]))
    bare = replace(bare, fixed=over[1] - work * answers[1], models=models | {last: replace(model, work=work)})
    for (name, model), sample in zip(others, samples[2:], strict=False):
        # At most what the peak leaves of a trajectory most of whose tokens that model reads.
        plan = sample.plan
        own = [(n, there) for call, n, there in bare.differentiated(plan) if plan.models[call.trace] == name]
        longest, there = max(own, default=(1, math.inf))
        model = replace(model, work=max(0.0, (sample.peak - bare.fixed - there) / longest))
        bare = replace(bare, models={**bare.models, name: model})
    return bare


def _sizes(system: MultiAgentSystem, bare: MemoryModel) -> list[tuple[int, list[int], int]]:
    """Of trajectories to measure: rows, the agents' prompt lengths, and latent steps at most.

    The last agent's model reads more in the second, and each other in one behind it.
    """
    agents = system.topology.agents

    def reading(tokens: int, model: str = "") -> list[int]:
        return [tokens if model == system.topology.model_of(agent) else _SHORT for agent in agents]

    sizes = [(1, reading(_SHORT), _STEPS)]
    longer = {}
    for name, model in system.models.items():
        # Rows that fill a recurrent layer's chunks are told apart from tokens by more.
        limit = (position_limit(model.language_model) or math.inf) // (len(agents) + 1) - _STEPS
        longer[name] = int(min(max(2 * _LONG, 2 * bare.models[name].chunk), limit))
    sizes += [(1, reading(longer[n] if m.state else _LONG, n), _STEPS) for n, m in bare.models.items()]
    sizes.append((4, reading(_SHORT), _STEPS))
    recurrent = [name for name, model in bare.models.items() if model.state]
    sizes += [(1, reading(_LONG, name), _STEPS) for name in recurrent]
    # States that few latent steps continue.
    return [*sizes, (2, reading(_SHORT), 1)] if recurrent else sizes


@dataclass(frozen=True)
class _Sample:
    plan: Plan
    held: int
    peak: int

    def features(self, model: MemoryModel) -> list[float]:
        """Of all its calls together, model by model."""
        found = []
        for name, own in model.models.items():
            calls = [own.features(c) for c in self.plan.calls if self.plan.models[c.trace] == name]
            found += [sum(column) for column in zip(*calls, strict=True)]
        return found

    @classmethod
    def measure(
        cls, system: MultiAgentSystem, rows: int, lengths: list[int], steps: int, autocast: torch.dtype | None
    ) -> _Sample:
        """The answers are as long as the last agent's prompts."""
        device, topology = system.agent_model.device, system.topology
        models = [system.models[topology.model_of(agent)].language_model for agent in topology.agents]
        vocabularies = [len(model.get_input_embeddings().weight) for model in models]
        # Rows that begin alike, as prompts do.
        ids = [
            (torch.arange(n, device=device) % size).repeat(rows) for n, size in zip(lengths, vocabularies, strict=True)
        ]
        prompts = [[n] * rows for n in lengths]
        training, whole, gradients = system.training, system.trajectory, [(p, p.grad) for p in system.parameters()]
        system.train().zero_grad(set_to_none=True)
        system.trajectory = replace(whole, latent_steps=min(whole.latent_steps, steps))
        context = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()

        def forward():
            with context:
                return system(ids, prompts, ids[-1], prompts[-1], return_logits=False).loss

        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                loss, held, _ = measure(forward, device)
                _, _, extra = measure(loss.backward, device)
            plan = plan_of(system, prompts, prompts[-1])
        finally:
            system.train(training)
            system.trajectory = whole
            for parameter, gradient in gradients:
                parameter.grad = gradient
        return cls(plan, held, held + extra)
