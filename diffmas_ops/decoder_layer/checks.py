"""What the decoder layer's operators take, for the specification and for fake tensors; the compiled ones check alike.

An error names the argument, what it was and what is allowed: `TypeError` for a dtype, `ValueError` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffmas_ops.layer import (
    DOWN,
    GATE,
    UP,
    BackwardInput,
    BackwardOutput,
    Forward,
    K,
    O,
    Parameters,
    Q,
    Turns,
    V,
)  # fmt: skip
from diffmas_ops.rows import RowRanges

#: What the compiled operators call the two ranges.
_ROWS = ("q_begin", "q_end", "starts", "max_seqlen_q")
_QUERIES = ("query_begin", "query_end", "query_starts", "query_max_seqlen_q")
_LENGTHS = {"weights": 7, "a": 7, "b": 7, "scalings": 7}


class Sizes(NamedTuple):
    """`tokens` of the call and `rows` of them whose results are wanted; `queries, kv`: head dim times heads."""

    tokens: int
    rows: int
    hidden: int
    queries: int
    kv: int
    inner: int
    dim: int
    ranks: list[int]


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int | None], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`tensor` has `shape` (None: any size), the device of `like`, and its dtype where no other is given."""
    if tensor.dim() != len(shape) or any(n is not None and n != m for n, m in zip(shape, tensor.shape, strict=True)):
        allowed = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; allowed: [{allowed}]")
    if tensor.dtype != (dtype or like.dtype):
        raise TypeError(f"{name} is {tensor.dtype}; allowed: {dtype or like.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {like.device}, as the other arguments")


def check_layer(
    tokens: int | None, like: Tensor, turns: Turns, parameters: Parameters, outputs: Tensor | None
) -> Sizes:
    """What all three operators share; `tokens` None: as many as there are angles."""
    (cos, sin), (norms, epsilon, weights, biases, a, b, *_) = turns, parameters
    for name, count in _LENGTHS.items():
        if (found := len(getattr(parameters, name))) != count:
            raise ValueError(f"there are {found} {name}; allowed: {count}")
    if len(norms) not in (4, 6):
        raise ValueError(f"there are {len(norms)} norms; allowed: 4, or 6 with those behind attention and MLP")
    if len(parameters.parts) not in (0, 4):
        raise ValueError(f"there are {len(parameters.parts)} parts; allowed: 4, or none")
    if len(biases) not in (0, 7):
        raise ValueError(f"there are {len(biases)} biases; allowed: 7, or none")
    if not epsilon >= 0:
        raise ValueError(f"epsilon is {epsilon}; allowed: 0 and above")
    for i, weight in enumerate(weights):
        check_tensor(f"weights[{i}]", weight, (None, None), like)
    hidden, queries, kv, inner = (weights[i].shape[0] for i in (O, Q, K, GATE))
    check_tensor("cos", cos, (tokens, None), like)
    tokens, dim = cos.shape
    if dim == 0 or dim % 2 or queries % dim or kv % dim:
        raise ValueError(f"cos has head dim {dim}; allowed: even divisors of {queries} and {kv}")
    check_tensor("sin", sin, (tokens, dim), like)
    widths = (hidden, hidden, queries, kv, hidden, hidden)
    for i, norm in enumerate(norms):
        if norm.numel() or i > 3:
            of_a_head = i in (2, 3) and norm.numel() != widths[i]
            check_tensor(f"norms[{i}]", norm, (dim if of_a_head else widths[i],), like)
    shapes = [
        (queries, hidden), (kv, hidden), (kv, hidden), (hidden, queries), (inner, hidden), (inner, hidden),
        (hidden, inner),
    ]  # fmt: skip
    for i, (out, size) in enumerate(shapes):
        check_tensor(f"weights[{i}]", weights[i], (out, size), like)
        check_tensor(f"a[{i}]", a[i], (None, size), like)
        check_tensor(f"b[{i}]", b[i], (out, a[i].shape[0]), like)
        if biases and biases[i].numel():
            check_tensor(f"biases[{i}]", biases[i], (out,), like)
    if outputs is not None:
        check_tensor("outputs", outputs, (None,), like, torch.int64)
    rows = tokens if outputs is None else outputs.shape[0]
    return Sizes(tokens, rows, hidden, queries, kv, inner, dim, [each.shape[0] for each in a])


def check_forward(given: Forward) -> Sizes:
    h, keys, rows, queries = given.h, given.keys, given.rows, given.queries
    check_tensor("h", h, (None, None), h)
    size = check_layer(h.shape[0], h, given.turns, given.parameters, given.outputs)
    check_tensor("h", h, (size.tokens, size.hidden), h)
    check_tensor("keys", keys, (None, size.kv // size.dim, None, size.dim), h)
    check_tensor("values", given.values, keys.shape, h)
    for ranges, names in ((rows, _ROWS), (queries, _QUERIES)):
        for name, tensor in zip(names[:3], ranges[:3], strict=True):
            check_tensor(name, tensor, (keys.shape[0],), h, torch.int32)
    for name, number in ((_ROWS[3], rows.max_seqlen_q), (_QUERIES[3], queries.max_seqlen_q)):
        if number < 0:
            raise ValueError(f"{name} is {number}; allowed: 0 and above")
    if not 0 <= queries.max_seqlen_k <= keys.shape[2]:
        raise ValueError(f"max_seqlen_k is {queries.max_seqlen_k}; allowed: 0 to {keys.shape[2]}, the capacity of keys")
    return size


def check_backward_output(given: BackwardOutput) -> Sizes:
    grad, saved = given.grad, given.saved
    size = check_layer(None, grad, given.turns, given.parameters, given.outputs)
    of_o, of_gate, of_up, of_down = (size.ranks[i] for i in (O, GATE, UP, DOWN))
    check_tensor("out", saved.out, (size.rows, size.queries // size.dim, size.dim), grad)
    for name, tensor, columns in (
        ("grad", grad, size.hidden), ("q", saved.q, size.queries), 
        ("gate", saved.gate, size.inner), ("up", saved.up, size.inner), ("low_o", saved.low_o, of_o),
        ("low_gate_up", saved.low_gate_up, of_gate + of_up), ("low_down", saved.low_down, of_down),
    ):  # fmt: skip
        check_tensor(name, tensor, (size.rows, columns), grad)
    check_tensor("states", saved.states, (size.rows * (3 if len(given.parameters.norms) > 4 else 1), size.hidden), grad)
    return size


def check_backward_input(given: BackwardInput) -> Sizes:
    h, saved = given.h, given.saved
    check_tensor("h", h, (None, None), h)
    size = check_layer(h.shape[0], h, given.turns, given.parameters, given.outputs)
    of_q, of_k, of_v = (size.ranks[i] for i in (Q, K, V))
    for name, tensor, shape in (
        ("h", h, (size.tokens, size.hidden)), ("k", saved.k, (size.tokens, size.kv)),
        ("q", saved.q, (size.rows, size.queries)), ("grad_middle", given.grad_middle, (size.rows, size.hidden)),
        ("low_q", saved.low_q, (size.rows, of_q)), ("low_kv", saved.low_kv, (size.tokens, of_k + of_v)),
        ("grad_q", given.grad_q, (size.rows, size.queries // size.dim, size.dim)),
        ("grad_k", given.grad_k, (size.tokens, size.kv // size.dim, size.dim)),
        ("grad_v", given.grad_v, (size.tokens, size.kv // size.dim, size.dim)),
    ):  # fmt: skip
        check_tensor(name, tensor, shape, h)
    return size


def check_outputs(outputs: Tensor | None, tokens: int) -> None:
    """The contents, which fake tensors do not have."""
    for token in [] if outputs is None else outputs.tolist():
        if not 0 <= token < tokens:
            raise ValueError(f"outputs has {token}; allowed: 0 to {tokens - 1}")


def check_contents(given: Forward, size: Sizes) -> None:
    """What fake tensors do not have: the tokens wanted, and every row's ranges of tokens and columns."""
    check_outputs(given.outputs, size.tokens)
    # What is appended may stand anywhere in the trace; a query sees no column behind `max_seqlen_k`.
    _check_ranges(_ROWS, given.rows, size.tokens, given.keys.shape[2])
    _check_ranges(_QUERIES, given.queries, size.rows, given.queries.max_seqlen_k)


def _check_ranges(names: tuple[str, ...], ranges: RowRanges, tokens: int, columns: int) -> None:
    """A row's range is among the `tokens`, as long as is said at most, and within the `columns`."""
    begins, ends, starts = (tensor.tolist() for tensor in ranges[:3])
    for row, (first, last, start) in enumerate(zip(begins, ends, starts, strict=True)):
        if not 0 <= first <= last <= tokens:
            raise ValueError(
                f"{names[0]}[{row}], {names[1]}[{row}] are {first}, {last}; "
                f"allowed: 0 <= {names[0]} <= {names[1]} <= {tokens}"
            )
        count = last - first
        if count > ranges.max_seqlen_q:
            raise ValueError(f"{names[3]} is {ranges.max_seqlen_q}; allowed: at least the {count} tokens of row {row}")
        if count and not 0 <= start <= columns - count:
            raise ValueError(f"{names[2]}[{row}] is {start}; allowed: 0 to {columns - count}")
