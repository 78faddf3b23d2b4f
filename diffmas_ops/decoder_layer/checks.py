"""What the decoder layer's operators take, for the specification and for fake tensors; the compiled ones check alike.

An error names the argument, what it was and what is allowed: `TypeError` for a dtype, `ValueError` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Q, K, V, O, GATE, UP, DOWN = range(7)  # noqa: E741
_LENGTHS = {"norms": 4, "weights": 7, "a": 7, "b": 7, "scalings": 7}


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
    tokens: int | None, like: Tensor, cos: Tensor, sin: Tensor, norms, epsilon, weights, biases, a, b, scalings,
    outputs: Tensor | None,
) -> Sizes:  # fmt: skip
    """What all three operators share; `tokens` None: as many as there are angles."""
    given = dict(norms=norms, weights=weights, a=a, b=b, scalings=scalings)
    for name, count in _LENGTHS.items():
        if len(given[name]) != count:
            raise ValueError(f"there are {len(given[name])} {name}; allowed: {count}")
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
    for i, norm in enumerate(norms):
        if i < 2 or norm.numel():
            check_tensor(f"norms[{i}]", norm, (hidden if i < 2 else dim,), like)
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


def check_forward(
    h, cos, sin, norms, epsilon, weights, biases, a, b, scalings, keys, values, q_begin, q_end, starts, max_seqlen_q,
    outputs, query_begin, query_end, query_starts, query_max_seqlen_q, max_seqlen_k,
) -> Sizes:  # fmt: skip
    check_tensor("h", h, (None, None), h)
    size = check_layer(h.shape[0], h, cos, sin, norms, epsilon, weights, biases, a, b, scalings, outputs)
    check_tensor("h", h, (size.tokens, size.hidden), h)
    check_tensor("keys", keys, (None, size.kv // size.dim, None, size.dim), h)
    check_tensor("values", values, keys.shape, h)
    index = dict(
        q_begin=q_begin, q_end=q_end, starts=starts, query_begin=query_begin, query_end=query_end,
        query_starts=query_starts,
    )  # fmt: skip
    for name, tensor in index.items():
        check_tensor(name, tensor, (keys.shape[0],), h, torch.int32)
    for name, number in (("max_seqlen_q", max_seqlen_q), ("query_max_seqlen_q", query_max_seqlen_q)):
        if number < 0:
            raise ValueError(f"{name} is {number}; allowed: 0 and above")
    if not 0 <= max_seqlen_k <= keys.shape[2]:
        raise ValueError(f"max_seqlen_k is {max_seqlen_k}; allowed: 0 to {keys.shape[2]}, the capacity of keys")
    return size


def check_backward_output(
    grad, cos, sin, q, out, middle, gate, up, low_o, low_gate_up, low_down, norms, epsilon, weights, biases, a, b,
    scalings, outputs,
) -> Sizes:  # fmt: skip
    size = check_layer(None, grad, cos, sin, norms, epsilon, weights, biases, a, b, scalings, outputs)
    of_o, of_gate, of_up, of_down = (size.ranks[i] for i in (O, GATE, UP, DOWN))
    check_tensor("out", out, (size.rows, size.queries // size.dim, size.dim), grad)
    for name, tensor, columns in (
        ("grad", grad, size.hidden), ("q", q, size.queries), ("middle", middle, size.hidden),
        ("gate", gate, size.inner), ("up", up, size.inner), ("low_o", low_o, of_o),
        ("low_gate_up", low_gate_up, of_gate + of_up), ("low_down", low_down, of_down),
    ):  # fmt: skip
        check_tensor(name, tensor, (size.rows, columns), grad)
    return size


def check_backward_input(
    grad_q, grad_k, grad_v, grad_middle, h, cos, sin, k, q, low_q, low_kv, norms, epsilon, weights, biases, a, b,
    scalings, outputs,
) -> Sizes:  # fmt: skip
    check_tensor("h", h, (None, None), h)
    size = check_layer(h.shape[0], h, cos, sin, norms, epsilon, weights, biases, a, b, scalings, outputs)
    of_q, of_k, of_v = (size.ranks[i] for i in (Q, K, V))
    for name, tensor, shape in (
        ("h", h, (size.tokens, size.hidden)), ("k", k, (size.tokens, size.kv)), ("q", q, (size.rows, size.queries)),
        ("grad_middle", grad_middle, (size.rows, size.hidden)), ("low_q", low_q, (size.rows, of_q)),
        ("low_kv", low_kv, (size.tokens, of_k + of_v)),
        ("grad_q", grad_q, (size.rows, size.queries // size.dim, size.dim)),
        ("grad_k", grad_k, (size.tokens, size.kv // size.dim, size.dim)),
        ("grad_v", grad_v, (size.tokens, size.kv // size.dim, size.dim)),
    ):  # fmt: skip
        check_tensor(name, tensor, shape, h)
    return size


def check_outputs(outputs: Tensor | None, tokens: int) -> None:
    """The contents, which fake tensors do not have."""
    for token in [] if outputs is None else outputs.tolist():
        if not 0 <= token < tokens:
            raise ValueError(f"outputs has {token}; allowed: 0 to {tokens - 1}")


def check_ranges(
    prefix: str, begin: Tensor, end: Tensor, starts: Tensor, tokens: int, max_seqlen_q: int, max_seqlen_k: int
):
    """Contents: a row's range is among the `tokens`, at most `max_seqlen_q` long, and within `max_seqlen_k` columns."""
    starts_name = "starts" if prefix == "q" else f"{prefix}_starts"
    of_max = "max_seqlen_q" if prefix == "q" else f"{prefix}_max_seqlen_q"
    for row, (first, last, start) in enumerate(zip(begin.tolist(), end.tolist(), starts.tolist(), strict=True)):
        if not 0 <= first <= last <= tokens:
            raise ValueError(
                f"{prefix}_begin[{row}], {prefix}_end[{row}] are {first}, {last}; "
                f"allowed: 0 <= {prefix}_begin <= {prefix}_end <= {tokens}"
            )
        count = last - first
        if count > max_seqlen_q:
            raise ValueError(f"{of_max} is {max_seqlen_q}; allowed: at least the {count} tokens of row {row}")
        if count and not 0 <= start <= max_seqlen_k - count:
            raise ValueError(f"{starts_name}[{row}] is {start}; allowed: 0 to {max_seqlen_k - count}")
