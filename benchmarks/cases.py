"""Sizes that are measured, and what each costs at least: FLOPs and bytes, counted by hand.

Rows are of equal length, because the peers cannot do without; a fixed length is their best case.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import chain, product, zip_longest
from typing import Any

from diffmas.agents.costs import Plan, Shape, Work
from diffmas.agents.topology import Agent, Topology
from diffmas.models.adapters import DEFAULT

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_ACCUMULATOR = 4


@dataclass(frozen=True)
class Case:
    @property
    def item(self) -> int:
        """Bytes of one number."""
        return _BYTES[self.dtype]

    @property
    def label(self) -> str:
        """The sizes in words (ASCII: it names tests), short enough for a table."""
        return " ".join(f"{name} {value}" for name, value in self._sizes().items())

    def _sizes(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Attention(Case):
    """`new` tokens a row over a trace that holds `prefix` columns before them."""

    batch: int
    prefix: int
    new: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    def _sizes(self):
        heads = f"{self.heads}/{self.kv_heads}x{self.head_dim}"
        return {"B": self.batch, "prefix": self.prefix, "new": self.new, "heads": heads}

    @property
    def columns(self) -> int:
        return self.prefix + self.new

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key it sees; a query sees prefix + (new + 1) / 2 keys on average."""
        return self.batch * self.heads * self.new * (self.prefix + (self.new + 1) / 2)

    def _trace(self, columns: float, item: int) -> float:
        """Bytes of `columns` keys and values of every row."""
        return 2 * self.batch * self.kv_heads * columns * self.head_dim * item

    def _queries(self, item: int) -> float:
        """Bytes of one tensor of the size of the queries."""
        return self.batch * self.new * self.heads * self.head_dim * item

    def forward(self) -> Work:
        """Append, read the trace once, read q, write out and log-sum-exp."""
        lse = self.batch * self.new * self.heads * _ACCUMULATOR
        trace = self._trace(self.columns + self.new, self.item)
        return Work(4 * self.pairs * self.head_dim, trace + 2 * self._queries(self.item) + lse)

    def backward(self) -> Work:
        """2.5 × the FLOPs; the trace read once, its accumulators read and written, own columns read back."""
        trace = self._trace(self.columns, self.item + 2 * _ACCUMULATOR) + self._trace(self.new, self.item)
        return Work(2.5 * self.forward().flops, trace + 4 * self._queries(self.item))

    def token_backward(self) -> Work:
        """Gradient of the queries and of their own column: scores, dO vᵀ and dS K; the trace read once."""
        trace = self._trace(self.columns, self.item) + self._trace(self.new, 2 * self.item + _ACCUMULATOR)
        return Work(6 * self.pairs * self.head_dim, trace + 6 * self._queries(self.item))


@dataclass(frozen=True)
class LatentRollout(Attention):
    """`new` consecutive calls of one token a row."""

    def forward(self) -> Work:
        """Every step reads the trace as far as it got."""
        steps = [Attention(**asdict(self) | {"prefix": self.prefix + t, "new": 1}).forward() for t in range(self.new)]
        return Work(sum(s.flops for s in steps), sum(s.bytes for s in steps))

    def backward(self) -> Work:
        """Every step reads the trace once for its queries; one pass over the accumulators for all of them."""
        steps = [
            Attention(**asdict(self) | {"prefix": self.prefix + t, "new": 1}).token_backward().bytes
            for t in range(self.new)
        ]
        flush = self._trace(self.columns, self.item + 2 * _ACCUMULATOR)
        return Work(2.5 * self.forward().flops, sum(steps) + flush)


@dataclass(frozen=True)
class Append(Case):
    """`new` tokens a row written behind `prefix` columns."""

    batch: int
    prefix: int
    new: int
    kv_heads: int
    head_dim: int
    dtype: str

    def _sizes(self):
        return {"B": self.batch, "prefix": self.prefix, "new": self.new, "heads": f"{self.kv_heads}x{self.head_dim}"}

    @property
    def numbers(self) -> int:
        """Of the new keys and values."""
        return 2 * self.batch * self.new * self.kv_heads * self.head_dim

    def forward(self) -> Work:
        return Work(0, 2 * self.numbers * self.item)

    def backward(self) -> Work:
        """Read from the accumulators."""
        return Work(0, self.numbers * (_ACCUMULATOR + self.item))


@dataclass(frozen=True)
class Concat(Case):
    """`senders` traces of `columns` columns a row each become one; all keys but the first sender's are rotated."""

    senders: int
    layers: int
    batch: int
    columns: int
    kv_heads: int
    head_dim: int
    dtype: str

    def _sizes(self):
        return {"senders": self.senders, "layers": self.layers, "B": self.batch, "columns": self.columns,
                "heads": f"{self.kv_heads}x{self.head_dim}"}  # fmt: skip

    @property
    def numbers(self) -> int:
        """Keys and values moved."""
        return 2 * self.senders * self.layers * self.batch * self.columns * self.kv_heads * self.head_dim

    def forward(self) -> Work:
        return Work(0, 2 * self.numbers * self.item)

    def backward(self) -> Work:
        """Read one accumulator, add to another."""
        return Work(0, 3 * self.numbers * _ACCUMULATOR)


@dataclass(frozen=True)
class Project(Case):
    """`rows` hidden states through Wₐ (or, without `weight`, rescaled only)."""

    rows: int
    hidden: int
    weight: bool
    dtype: str

    def _sizes(self):
        return {"rows": self.rows, "hidden": self.hidden, "alignment": "learned" if self.weight else "identity"}

    def forward(self) -> Work:
        product = self.hidden**2 * self.weight
        return Work(2 * self.rows * product, (product + 2 * self.rows * self.hidden) * self.item)

    def backward(self) -> Work:
        """Both gradients; that of Wₐ is written in the accumulator's dtype."""
        product, states = self.hidden**2 * self.weight, self.rows * self.hidden
        return Work(4 * self.rows * product, product * (self.item + _ACCUMULATOR) + 4 * states * self.item)


@dataclass(frozen=True)
class Expect(Case):
    """`rows` hidden states to the embeddings expected of their next tokens; `tied`: one matrix is keys and values."""

    rows: int
    hidden: int
    vocab: int
    tied: bool
    dtype: str

    def _sizes(self):
        return {"rows": self.rows, "hidden": self.hidden, "vocab": self.vocab, "tied": "yes" if self.tied else "no"}

    @property
    def _matrices(self) -> int:
        """Bytes of both, each read once."""
        return (2 - self.tied) * self.vocab * self.hidden * self.item

    def forward(self) -> Work:
        states = 2 * self.rows * self.hidden * self.item
        return Work(4 * self.rows * self.vocab * self.hidden, self._matrices + states)

    def backward(self) -> Work:
        """Of the hidden states: scores and probabilities anew, their gradients, and back through the keys."""
        states = 4 * self.rows * self.hidden * self.item
        return Work(6 * self.rows * self.vocab * self.hidden, self._matrices + states)


@dataclass(frozen=True)
class Merge(Case):
    """Attention over `splits` disjoint key sets combined."""

    splits: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str

    def _sizes(self):
        return {"splits": self.splits, "tokens": self.tokens, "heads": f"{self.heads}x{self.head_dim}"}

    def forward(self) -> Work:
        rows = (self.splits + 1) * self.tokens * self.heads
        return Work(0, rows * (self.head_dim * self.item + _ACCUMULATOR))


@dataclass(frozen=True)
class Step(Case):
    """One training step of a Qwen3-shaped model with LoRA: `agents` in sequence, full hand-over."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    agents: int
    prompt: int
    latent: int
    answer: int
    batch: int
    dtype: str

    def _sizes(self):
        return {"layers": self.layers, "hidden": self.hidden, "agents": self.agents, "prompt": self.prompt,
                "m": self.latent, "B": self.batch}  # fmt: skip

    @property
    def columns(self) -> int:
        """Of the finished trace."""
        return (self.agents - 1) * (self.prompt + self.latent) + self.prompt + self.answer

    @property
    def tokens(self) -> int:
        """Read, thought and answered in a step, of all rows."""
        return self.batch * self.columns

    @property
    def layer_calls(self) -> int:
        """How often a layer is called in the forward."""
        return self.layers * ((self.agents - 1) * (1 + self.latent) + 1)

    @property
    def shape(self) -> Shape:
        """Of the model, without LoRA."""
        heads = (self.heads, self.kv_heads, self.head_dim)
        return Shape.dense(self.layers, self.hidden, self.intermediate, *heads, self.vocab, self.item, _ACCUMULATOR)

    def step(self) -> Work:
        """Forward, and backward through frozen weights (no weight gradients; LoRA is left out)."""
        names = [f"agent{i}" for i in range(self.agents)]
        chain = Topology("chain", tuple(Agent(n, tuple(names[max(0, i - 1) : i])) for i, n in enumerate(names)))
        plan = Plan.of(chain, self.latent, [[self.prompt] * self.batch] * self.agents, [self.answer] * self.batch)
        return sum(plan.work({DEFAULT: self.shape}).values(), Work())

    def latent_forward(self) -> Work:
        """The latent steps of one agent behind one prompt; every step reads the weights and the trace."""
        trace = LatentRollout(
            self.batch, self.prompt, self.latent, self.heads, self.kv_heads, self.head_dim, self.dtype
        ).forward()  # fmt: skip
        return Work(
            2 * self.batch * self.latent * self.shape.weights + self.layers * trace.flops,
            self.latent * self.shape.weights * self.item + self.layers * trace.bytes,
        )


#: A model's attention: heads, key/value heads, head dim (Qwen3 8B, Qwen3 14B, Llama 3.2 1B).
_GROUPS = ((32, 8, 128), (40, 8, 128), (32, 8, 64))
_TRACES = (512, 2048, 8192, 32768)

#: Four agents, m = 40: 37 MB of trace.
FULL_STEP = Step(8, 512, 1536, 8, 4, 64, 1024, 4, 512, 40, 32, 1, "float32")
#: Single-token calls of a model too small to compute: what is left is what a call costs beside its arithmetic.
OVERHEAD_STEP = Step(8, 32, 64, 2, 1, 16, 64, 2, 1, 64, 1, 1, "float32")
#: A step, and the values of one size after the other that it is measured at.
STEP_BASE = Step(2, 256, 768, 4, 2, 64, 512, 3, 128, 8, 16, 1, "float32")
STEP_AXES = {
    "latent": (0, 8, 16, 32, 64),
    "prompt": (128, 256, 512, 1024, 2048),
    "agents": (2, 3, 4, 5, 6),
    "batch": (1, 2, 4, 8, 16, 32),
}
SMALL_STEPS = (
    Step(4, 256, 768, 4, 2, 64, 512, 4, 64, 10, 16, 2, "float32"),
    Step(4, 256, 768, 4, 2, 64, 512, 4, 128, 20, 16, 1, "float32"),
)


#: Models of the size that is trained in earnest, with random weights (Qwen3 4B, Qwen3 8B), and their task.
_QWEN3 = dict(layers=36, heads=32, kv_heads=8, head_dim=128, vocab=151936)
_TASK = dict(agents=4, prompt=384, latent=10, answer=1024, dtype="bfloat16")
MODEL_STEPS = tuple(
    Step(hidden=hidden, intermediate=intermediate, batch=1, **_QWEN3, **_TASK)
    for hidden, intermediate in ((2560, 9728), (4096, 12288))
)
MODEL_BATCHES = (4, 32, 1)


def operator_cases(device: str) -> list[Case]:
    """Every operator at every size for `device` ("cpu", "cuda"), most important first."""
    return _cuda_cases() if device == "cuda" else _cpu_cases()


def step_cases(device: str) -> list[Step]:
    """Training steps for `device`, most important first."""
    if device == "cpu":
        return [*SMALL_STEPS, FULL_STEP]
    qwen3 = dict(layers=28, hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128, vocab=32768)
    task = dict(agents=4, prompt=512, answer=128, dtype="bfloat16")
    return [
        Step(latent=40, batch=4, **qwen3, **task),
        Step(latent=10, batch=8, **qwen3, **task),
        FULL_STEP,
    ]


def _cpu_cases() -> list[Case]:
    f32 = dict(dtype="float32")
    heads = dict(heads=8, kv_heads=4, head_dim=64)
    return [
        LatentRollout(1, 512, 16, **heads, **f32),
        Attention(1, 512, 128, **heads, **f32),
        Attention(1, 0, 512, **heads, **f32),
        Attention(1, 1024, 1, **heads, **f32),
        Attention(8, 256, 1, **heads, **f32),
        Attention(4, 256, 1, heads=4, kv_heads=2, head_dim=128, **f32),
        Concat(3, 4, 2, 256, 4, 64, **f32),
        Concat(3, 8, 1, 64, 4, 64, **f32),
        Append(8, 512, 64, 4, 64, **f32),
        Append(8, 512, 1, 4, 64, **f32),
        Project(1, 512, True, **f32),
        Project(16, 512, True, **f32),
        Project(16, 512, False, **f32),
        # SmolLM2-135M's vocabulary.
        Expect(8, 576, 49152, True, **f32),
        Expect(1, 576, 49152, False, **f32),
        Merge(8, 16, 8, 64, **f32),
    ]


def _cuda_cases() -> list[Case]:
    bf16 = dict(dtype="bfloat16")
    groups = [dict(heads=h, kv_heads=kv, head_dim=d) for h, kv, d in _GROUPS]
    qwen = groups[0]
    anchors = [
        LatentRollout(1, 4096, 32, **qwen, **bf16),
        Attention(4, 8192, 2048, **qwen, **bf16),
        Attention(1, 0, 8192, **qwen, **bf16),
        Attention(8, 8192, 1, **qwen, **bf16),
        Concat(3, 32, 8, 2048, 8, 128, **bf16),
        Append(64, 8192, 512, 8, 128, **bf16),
        Project(8, 4096, True, **bf16),
        LatentRollout(16, 4096, 32, **qwen, **bf16),
        Append(64, 8192, 1, 8, 128, **bf16),
        Merge(16, 64, 32, 128, **bf16),
    ]
    projections = [Project(n, h, True, **bf16) for h, n in product((2560, 4096, 5120), (1, 4, 16, 64, 128))]
    projections += [Project(64, 4096, False, **bf16)]
    # Qwen3 4B and 8B.
    expectations = [Expect(n, h, 151936, h < 4096, **bf16) for h, n in product((2560, 4096), (1, 8, 64))]
    prefills = [
        Attention(b, prefix, prefix // 4, **g, **bf16) for g in groups for prefix, b in product(_TRACES, (1, 8))
    ]
    tokens = [Attention(b, n, 1, **g, **bf16) for g in groups for n, b in product(_TRACES, (1, 8, 64))]
    concats = [Concat(n, 4, b, c, 8, 128, **bf16) for n, b, c in product((2, 8), (1, 16), (512, 8192))]
    appends = [Append(b, 2048, n, 8, 128, **bf16) for b, n in product((1, 8, 64), (1, 2048))]
    # One of each in turn: a run cut off has seen something of everything.
    sweep = chain.from_iterable(zip_longest(prefills, tokens, projections, expectations, concats, appends))
    return list(dict.fromkeys([*anchors, *(case for case in sweep if case is not None)]))
