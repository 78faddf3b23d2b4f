"""What a training step has to compute and to move: FLOPs and bytes by phase, counted by hand.

Counted are products with weights, attention, and reads of weights, traces and gradient accumulators. Activations,
norms, embeddings and the optimizer are not: the floor made from these counts is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from diffmas.agents.topology import Topology
from diffmas.models.agent_model import AgentModel, Lengths
from diffmas.models.outline import decoder_of
from diffmas.models.rotation import configured
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.scores import Scores

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
class Attention:
    """Attention layers of one mask: numbers of a token's queries and of a trace's column, all of them together.

    `window`, `chunk`: as a :class:`~diffmas.models.geometry.LayerGeometry` has them.
    """

    queries: int
    column: int
    window: int | None = None
    chunk: int | None = None

    def pairs(self, before: int, count: int) -> float:
        """Of a query and a key it sees, for `count` queries behind `before` columns."""
        return self._pairs(before + count) - self._pairs(before)

    def columns(self, before: int, count: int) -> int:
        """What `count` queries of one call behind `before` columns see together."""
        return before + count - Scores(1.0, self.window, chunk=self.chunk).first_seen(before)

    def _pairs(self, columns: int) -> float:
        """For all queries of so many columns."""
        if self.window is not None:
            full = min(columns, self.window)
            return full * (full + 1) / 2 + (columns - full) * full
        chunks, rest = divmod(columns, self.chunk or max(columns, 1))
        size = self.chunk or columns
        return chunks * size * (size + 1) / 2 + rest * (rest + 1) / 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder: what of a model the counts depend on.

    Attributes:
        weights: of the linear layers of all decoder layers that a token goes through: of experts, as many as it takes.
        adapter: weights of adapters, all layers together; `trained`: whether the base model's weights train.
        item, accumulator: bytes of an element of the model and of a trace's gradient.
    """

    hidden: int
    vocab: int
    weights: int
    attention: tuple[Attention, ...]
    item: int
    accumulator: int
    adapter: int = 0
    trained: bool = False

    @classmethod
    def of(cls, model: AgentModel, dtype: torch.dtype | None = None) -> Shape:
        """Of a model, whose adapters are inside; `dtype`: what it computes in."""
        language_model = model.language_model
        config, dtype = language_model.config.get_text_config(decoder=True), dtype or language_model.dtype
        decoder = decoder_of(language_model)
        adapters = {n: p for n, p in decoder.named_parameters() if "lora_" in n}
        others = (p for n, p in decoder.named_parameters() if n not in adapters and p.dim() == 2)
        kinds: dict[tuple[int | None, int | None], list[int]] = {}
        for layer in model.layers.values():
            sizes = kinds.setdefault((layer.window, layer.chunk), [0, 0])
            sizes[0] += layer.num_heads * layer.head_dim
            sizes[1] += 2 * layer.num_kv_heads * layer.head_dim
        return cls(
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            weights=_weights(decoder, configured(config, "num_experts_per_tok") or 1),
            attention=tuple(Attention(sizes[0], sizes[1], *kind) for kind, sizes in kinds.items()),
            item=dtype.itemsize,
            accumulator=accumulation_dtype(dtype).itemsize,
            adapter=sum(p.numel() for p in adapters.values()),
            trained=not adapters and any(p.requires_grad for p in others),
        )

    @classmethod
    def dense(
        cls, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocab: int,
        item: int, accumulator: int, adapter: int = 0, trained: bool = False,
    ) -> Shape:  # fmt: skip
        """Of uniform layers with a gated MLP, whose queries see everything."""
        weights = layers * hidden * ((2 * heads + 2 * kv_heads) * head_dim + 3 * intermediate)
        attention = Attention(layers * heads * head_dim, 2 * layers * kv_heads * head_dim)
        return cls(hidden, vocab, weights, (attention,), item, accumulator, adapter, trained)

    @property
    def column(self) -> int:
        """Numbers in a trace's column, all layers together."""
        return sum(layers.column for layers in self.attention)


def _weights(decoder: nn.Module, experts: int) -> int:
    """Of linear layers, adapters' own aside; stacks of experts count for the `experts` that a token takes."""
    total = 0
    for name, module in decoder.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, nn.Linear):
            total += module.in_features * module.out_features
        elif "experts" in name.rpartition(".")[2]:
            stacks = (p for p in module.parameters(recurse=False) if p.dim() == 3)
            total += sum(p[0].numel() * min(experts, len(p)) for p in stacks)
    return total


@dataclass(frozen=True)
class Call:
    """A read of every row's prompt, or all latent steps of an agent.

    Attributes:
        phase: one of :data:`PHASES`; what comes over a bridge is read as a prompt is.
        trace: index of the trace it writes.
        rows: per row, the columns there are before it, and those that it writes.
        steps: how often weights are read for them.
    """

    phase: str
    trace: int
    rows: tuple[tuple[int, int], ...]
    steps: int
    differentiated: bool

    @property
    def tokens(self) -> int:
        """Of all rows and steps."""
        return sum(new for _, new in self.rows)

    def pairs(self, layers: Attention) -> float:
        """Of a query and a key it sees, over rows and steps."""
        return sum(layers.pairs(before, new) for before, new in self.rows)

    def columns(self, layers: Attention) -> float:
        """Of the trace that are read, over rows and steps."""
        # A step is one query: it reads what it sees.
        return self.pairs(layers) if self.phase == "latent" else sum(layers.columns(*row) for row in self.rows)


@dataclass(frozen=True)
class Plan:
    """A trajectory's calls in order, and the columns allocated for every trace (all rows together).

    `models`: of every trace, the name of the model that writes it.
    """

    calls: tuple[Call, ...]
    columns: tuple[int, ...]
    answer_tokens: int
    models: tuple[str, ...]

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
        models: list[str] = []
        home: dict[str, int] = {}
        by_name = {a.name: p for a, p in zip(topology.agents, prompts, strict=True)}
        bridged = {a.name: topology.states_read(a, by_name, latent_steps) for a in topology.agents}
        written = {
            name: [more + n + latent_steps for more, n in zip(bridged[name], own, strict=True)]
            for name, own in by_name.items()
        }
        for agent, own in zip(topology.agents, prompts, strict=True):
            if (sender := topology.continues(agent)) is not None:
                home[agent.name] = home[sender]
            else:
                home[agent.name] = len(lengths)
                models.append(topology.model_of(agent))
                full = topology.handover == "full"
                given = [written[n] if full else [latent_steps] * len(own) for n in topology.attended(agent.name)]
                sink = topology.sink_of(agent) if given else 0
                lengths.append([sink + sum(column) for column in zip([0] * len(own), *given, strict=True)])
            last = agent is topology.last
            rows = lengths[home[agent.name]]
            call = partial(Call, trace=home[agent.name], differentiated=last or not detach_trace)
            if topology.bridged(agent):
                read = bridged[agent.name]
                calls.append(call("prefill", rows=tuple(zip(rows, read, strict=True)), steps=1))
                rows = [before + n for before, n in zip(rows, read, strict=True)]
            new = [n + a for n, a in zip(own, answers, strict=True)] if last else list(own)
            calls.append(call("answer" if last else "prefill", rows=tuple(zip(rows, new, strict=True)), steps=1))
            rows = [before + n for before, n in zip(rows, new, strict=True)]
            if not last and (m := latent_steps):
                calls.append(call("latent", rows=tuple((before, m) for before in rows), steps=m))
                rows = [before + m for before in rows]
            lengths[home[agent.name]] = rows
        columns = tuple(len(row) * max(row) for row in lengths)
        return cls(tuple(calls), columns, sum(answers), tuple(models))

    def work(self, shapes: Mapping[str, Shape], checkpointing: str = "none") -> dict[str, Work]:
        """By phase; "<phase> backward" includes what checkpointing runs again. `shapes`: by the name of the model."""
        total = {name: Work() for phase in PHASES for name in (phase, phase + BACKWARD)}
        for call in self.calls:
            shape = shapes[self.models[call.trace]]
            total[call.phase] += _forward(shape, call)
            if call.differentiated:
                total[call.phase + BACKWARD] += _backward(shape, call)
                if checkpointing == "all" or (checkpointing == "prefill" and call.phase != "latent"):
                    total[call.phase + BACKWARD] += _forward(shape, call)
        shape = shapes[self.models[self.calls[-1].trace]]
        head = shape.hidden * shape.vocab
        total["answer"] += Work(2 * self.answer_tokens * head, head * shape.item)
        total["answer" + BACKWARD] += Work(2 * self.answer_tokens * head * (1 + shape.trained), head * shape.item)
        return total


def floor_seconds(work: Mapping[str, Work], matmul: float, copy: float) -> float:
    """What the phases take at least, one after the other."""
    return sum(w.seconds(matmul, copy) for w in work.values())


def _forward(shape: Shape, call: Call) -> Work:
    weights = shape.weights + shape.adapter
    attention = 4 * sum(layers.queries * call.pairs(layers) for layers in shape.attention)
    moved = weights * call.steps + _columns(shape, call) + shape.column * call.tokens
    return Work(2 * weights * call.tokens + attention, moved * shape.item)


def _backward(shape: Shape, call: Call) -> Work:
    """Gradients of inputs through every weight, of the weights that train, and of attention at 2.5 × its forward.

    A latent step reads the trace's columns; the accumulators are read and written once for all steps of a run.
    """
    weights = shape.weights * (1 + shape.trained) + 2 * shape.adapter
    attention = 10 * sum(layers.queries * call.pairs(layers) for layers in shape.attention)
    read = _columns(shape, call)
    moved = (shape.weights + shape.adapter) * call.steps + read
    accumulators = 2 * read / call.steps * shape.accumulator
    return Work(2 * weights * call.tokens + attention, moved * shape.item + accumulators)


def _columns(shape: Shape, call: Call) -> float:
    """Numbers of the trace that a call reads."""
    return sum(layers.column * call.columns(layers) for layers in shape.attention)
