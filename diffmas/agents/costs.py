"""What a training step has to compute and to move: FLOPs and bytes by phase, counted by hand.

Counted are products with weights, attention, and reads of weights, traces and gradient accumulators. Activations,
norms, embeddings and the optimizer are not: the floor made from these counts is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from diffmas.agents.topology import Topology
from diffmas.models.geometry import configured
from diffmas.models.outline import decoder_of
from diffmas_ops.dtypes import accumulation_dtype

Lengths = Sequence[int]

#: Phases of a step, in order; each has a backward.
PHASES = ("prefill", "latent", "answer")
BACKWARD = " backward"


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes read and written."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, matmul: float, copy: float) -> float:
        """At least, at `matmul` FLOP and `copy` bytes a second."""
        return max(self.flops / matmul, self.bytes / copy)


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder with a gated MLP: what of a model the counts depend on.

    Attributes:
        adapter: weights of adapters, all layers together; `trained`: whether the base model's weights train.
        item, accumulator: bytes of an element of the model and of a trace's gradient.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    item: int
    accumulator: int
    adapter: int = 0
    trained: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Shape:
        """Of a transformers causal language model, whose adapters are inside; `dtype`: what it computes in."""
        config, dtype = model.config.get_text_config(decoder=True), dtype or model.dtype
        adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
        others = (p for n, p in decoder_of(model).named_parameters() if n not in adapters and p.dim() == 2)
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=configured(config, "intermediate_size") or 4 * config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=configured(config, "num_key_value_heads") or config.num_attention_heads,
            head_dim=configured(config, "head_dim") or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            item=dtype.itemsize,
            accumulator=accumulation_dtype(dtype).itemsize,
            adapter=sum(p.numel() for p in adapters.values()),
            trained=not adapters and any(p.requires_grad for p in others),
        )

    @property
    def weights(self) -> int:
        """Of the linear layers of all decoder layers."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def column(self) -> int:
        """Numbers in a trace's column, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Call:
    """A read of every row's prompt, or all latent steps of an agent.

    Attributes:
        phase: one of :data:`PHASES`. trace: index of the trace it writes.
        tokens: of all rows and steps; `steps`: how often weights are read for them.
        pairs: of a query and a key it sees, over rows and steps.
        columns: of the trace that are read, over rows and steps.
    """

    phase: str
    trace: int
    tokens: int
    steps: int
    pairs: float
    columns: int
    differentiated: bool


@dataclass(frozen=True)
class Plan:
    """A trajectory's calls in order, and the columns allocated for every trace (all rows together)."""

    calls: tuple[Call, ...]
    columns: tuple[int, ...]
    answer_tokens: int

    @classmethod
    def of(
        cls,
        topology: Topology,
        latent_steps: int,
        prompts: Sequence[Lengths],
        answers: Lengths,
        *,
        detach_trace: bool = False,
    ) -> Plan:
        """`prompts`: per agent of `topology`, the rows' prompt lengths; `answers`: the rows' answer lengths."""
        calls: list[Call] = []
        lengths: list[list[int]] = []
        home: dict[str, int] = {}
        written = {a.name: [n + latent_steps for n in p] for a, p in zip(topology.agents, prompts, strict=True)}
        for agent, own in zip(topology.agents, prompts, strict=True):
            if (sender := topology.continues(agent)) is not None:
                home[agent.name] = home[sender]
            else:
                home[agent.name] = len(lengths)
                full = topology.handover == "full"
                given = [written[n] if full else [latent_steps] * len(own) for n in topology.ancestors(agent.name)]
                sink = topology.sink_columns if given else 0
                lengths.append([sink + sum(column) for column in zip([0] * len(own), *given, strict=True)])
            last = agent is topology.last
            rows = lengths[home[agent.name]]
            new = [n + a for n, a in zip(own, answers, strict=True)] if last else list(own)
            call = partial(Call, trace=home[agent.name], differentiated=last or not detach_trace)
            pairs = sum(n * (before + (n + 1) / 2) for before, n in zip(rows, new, strict=True))
            rows = [before + n for before, n in zip(rows, new, strict=True)]
            phase = "answer" if last else "prefill"
            calls.append(call(phase, tokens=sum(new), steps=1, pairs=pairs, columns=sum(rows)))
            if not last and (m := latent_steps):
                seen = sum(m * before + m * (m + 1) // 2 for before in rows)
                calls.append(call("latent", tokens=m * len(rows), steps=m, pairs=seen, columns=seen))
                rows = [before + m for before in rows]
            lengths[home[agent.name]] = rows
        return cls(tuple(calls), tuple(len(row) * max(row) for row in lengths), sum(answers))

    def work(self, shape: Shape, checkpointing: str = "none") -> dict[str, Work]:
        """By phase; "<phase> backward" includes what checkpointing runs again."""
        total = {name: Work() for phase in PHASES for name in (phase, phase + BACKWARD)}
        for call in self.calls:
            total[call.phase] += _forward(shape, call)
            if call.differentiated:
                total[call.phase + BACKWARD] += _backward(shape, call)
                if checkpointing == "all" or (checkpointing == "prefill" and call.phase != "latent"):
                    total[call.phase + BACKWARD] += _forward(shape, call)
        head = shape.hidden * shape.vocab
        total["answer"] += Work(2 * self.answer_tokens * head, head * shape.item)
        total["answer" + BACKWARD] += Work(2 * self.answer_tokens * head * (1 + shape.trained), head * shape.item)
        return total


def floor_seconds(work: Mapping[str, Work], matmul: float, copy: float) -> float:
    """What the phases take at least, one after the other."""
    return sum(w.seconds(matmul, copy) for w in work.values())


def _forward(shape: Shape, call: Call) -> Work:
    weights = shape.weights + shape.adapter
    attention = 4 * shape.layers * shape.heads * shape.head_dim * call.pairs
    moved = weights * call.steps + shape.column * (call.columns + call.tokens)
    return Work(2 * weights * call.tokens + attention, moved * shape.item)


def _backward(shape: Shape, call: Call) -> Work:
    """Gradients of inputs through every weight, of the weights that train, and of attention at 2.5 × its forward.

    A latent step reads the trace's columns; the accumulators are read and written once for all steps of a run.
    """
    weights = shape.weights * (1 + shape.trained) + 2 * shape.adapter
    attention = 10 * shape.layers * shape.heads * shape.head_dim * call.pairs
    moved = (shape.weights + shape.adapter) * call.steps + shape.column * call.columns
    accumulators = 2 * shape.column * call.columns / call.steps * shape.accumulator
    return Work(2 * weights * call.tokens + attention, moved * shape.item + accumulators)
