"""What the decoder layer's operators take and keep, a group each as one argument; the compiled ones take them flat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from diffmas_ops.rows import RowRanges
from diffmas_ops.scores import Scores

#: Places of the seven products in lists.
Q, K, V, O, GATE, UP, DOWN = range(7)  # noqa: E741


class Turns(NamedTuple):
    """By how much every token's queries and keys are turned; `[N, D]`."""

    cos: Tensor
    sin: Tensor


class Parts(NamedTuple):
    """What layers differ in beside their weights.

    Args:
        norm_offset: added to the norms' weights.
        slope, cubic: of the gate `g σ(g (slope + cubic g²))`.
        residual_scale: by what attention and MLP are multiplied before they are added.
    """

    norm_offset: float = 0.0
    slope: float = 1.0
    cubic: float = 0.0
    residual_scale: float = 1.0


class Parameters(NamedTuple):
    """A layer's weights, and what it makes of them. What there is none of has no element.

    Args:
        norms: before attention and MLP `[hidden]`, of queries and keys `[D]` (each head) or `[heads D]` (all together),
            and, where there are any, behind attention and MLP `[hidden]`.
        epsilon: of all norms.
        weights: `[out, in]` of q, k, v, o, gate, up, down, as all that follow.
        biases: `[out]`; an empty list: nowhere.
        a, b: the adapters, `[r, in]` and `[out, r]`; r = 0 where there is none.
        scalings: of the adapters.
        parts: :class:`Parts`; none: as they are where nothing is said.
    """

    norms: Sequence[Tensor]
    epsilon: float
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scalings: Sequence[float]
    parts: Sequence[float] = ()


class SavedOutput(NamedTuple):
    """What the backward of all behind the attention takes, of the M tokens whose results are wanted.

    Args:
        q: `[M, Hq D]` before rotation.
        out: of the attention, `[M, Hq, D]`.
        states: between attention and MLP, `[M, hidden]`; where norms stand behind these, `[3 M, hidden]`: below it the
            results of attention, then of the MLP.
        gate, up: `[M, inner]`.
        low_o, low_gate_up, low_down: `x Aᵀ`, `[M, r]`.
    """

    q: Tensor
    out: Tensor
    states: Tensor
    gate: Tensor
    up: Tensor
    low_o: Tensor
    low_gate_up: Tensor
    low_down: Tensor


class SavedInput(NamedTuple):
    """What the backward of all before the attention takes.

    Args:
        k: `[N, Hkv D]` before rotation.
        q: `[M, Hq D]` before rotation.
        low_q, low_kv: `x Aᵀ`, `[M, r]` and `[N, r]`.
    """

    k: Tensor
    q: Tensor
    low_q: Tensor
    low_kv: Tensor


class Saved(NamedTuple):
    """All that a forward keeps, as it returns it behind its result; `lse [M, Hq]`."""

    k: Tensor
    q: Tensor
    out: Tensor
    lse: Tensor
    states: Tensor
    gate: Tensor
    up: Tensor
    low_q: Tensor
    low_kv: Tensor
    low_o: Tensor
    low_gate_up: Tensor
    low_down: Tensor

    @property
    def of_output(self) -> SavedOutput:
        return SavedOutput(
            self.q, self.out, self.states, self.gate, self.up, self.low_o, self.low_gate_up, self.low_down
        )  # fmt: skip

    @property
    def of_input(self) -> SavedInput:
        return SavedInput(self.k, self.q, self.low_q, self.low_kv)


class Forward(NamedTuple):
    """Arguments of `decoder_layer`; see there."""

    h: Tensor
    turns: Turns
    parameters: Parameters
    keys: Tensor
    values: Tensor
    rows: RowRanges
    outputs: Tensor | None
    queries: RowRanges
    scores: Scores

    @classmethod
    def of(cls, h, cos, sin, *rest) -> Forward:
        """From the compiled operator's flat arguments."""
        *parameters, keys, values, begin, end, starts, longest, outputs = rest[:15]
        queries, scores = RowRanges(*rest[15:20]), Scores(*rest[20:])
        rows = RowRanges(begin, end, starts, longest, queries.max_seqlen_k)
        return cls(h, Turns(cos, sin), Parameters(*parameters), keys, values, rows, outputs, queries, scores)

    def flat(self) -> tuple:
        """The compiled operator's arguments."""
        return flat_forward(*self)


class BackwardOutput(NamedTuple):
    """Arguments of `decoder_layer_backward_output`; see there."""

    grad: Tensor
    turns: Turns
    saved: SavedOutput
    parameters: Parameters
    outputs: Tensor | None

    @classmethod
    def of(cls, grad, cos, sin, *rest) -> BackwardOutput:
        """From the compiled operator's flat arguments."""
        return cls(grad, Turns(cos, sin), SavedOutput(*rest[:8]), Parameters(*rest[8:-1]), rest[-1])

    def flat(self) -> tuple:
        """The compiled operator's arguments."""
        return flat_backward_output(*self)


class BackwardInput(NamedTuple):
    """Arguments of `decoder_layer_backward_input`; see there."""

    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_middle: Tensor
    h: Tensor
    turns: Turns
    saved: SavedInput
    parameters: Parameters
    outputs: Tensor | None

    @classmethod
    def of(cls, grad_q, grad_k, grad_v, grad_middle, h, cos, sin, *rest) -> BackwardInput:
        """From the compiled operator's flat arguments."""
        return cls(
            grad_q, grad_k, grad_v, grad_middle, h, Turns(cos, sin), SavedInput(*rest[:4]),
            Parameters(*rest[4:-1]), rest[-1],
        )  # fmt: skip

    def flat(self) -> tuple:
        """The compiled operator's arguments."""
        return flat_backward_input(*self)


# Called for every layer of every latent step: without an object made in between.


def flat_forward(h, turns, parameters, keys, values, rows, outputs, queries, scores) -> tuple:
    """The arguments of :class:`Forward`, flat: both ranges share the last column."""
    return (h, *turns, *parameters, keys, values, *rows[:4], outputs, *queries, *scores)


def flat_backward_output(grad, turns, saved, parameters, outputs) -> tuple:
    """The arguments of :class:`BackwardOutput`, flat."""
    return (grad, *turns, *saved, *parameters, outputs)


def flat_backward_input(grad_q, grad_k, grad_v, grad_middle, h, turns, saved, parameters, outputs) -> tuple:
    """The arguments of :class:`BackwardInput`, flat."""
    return (grad_q, grad_k, grad_v, grad_middle, h, *turns, *saved, *parameters, outputs)
