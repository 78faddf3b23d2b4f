"""Experiments of the operators around attention: append, concatenation, projection, expected embedding, merging."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Append, Concat, Expect, Merge, Project
from benchmarks.contest import experiment, gradients, int32, normal
from benchmarks.experiment import Contender, Experiment
from diffmas_ops.rows import RowRanges

_TARGET_NORM, _TEMPERATURE = 1.5, 0.7


def append_forward(case: Append, device: str) -> Experiment:
    """New keys and values into a trace with room for them, against concatenation, which copies the trace."""
    shape = (case.batch, case.kv_heads, case.prefix, case.head_dim)
    past = [normal(*shape, like=case, device=device) for _ in range(2)]
    new = [normal(case.batch * case.new, *shape[1::2], like=case, device=device) for _ in range(2)]
    dense = [x.unflatten(0, (case.batch, -1)).transpose(1, 2) for x in new]
    begin = int32([b * case.new for b in range(case.batch)], device)

    def exact():
        return tuple(torch.cat(pair, 2) for pair in zip(past, dense, strict=True))

    def ours(ops, _):
        trace = [torch.cat((x, torch.zeros_like(y)), 2) for x, y in zip(past, dense, strict=True)]
        rows = RowRanges(begin, begin + case.new, torch.full_like(begin, case.prefix), case.new, case.prefix + case.new)
        return Contender(lambda _: ops.kv_append(*new, *trace, rows), read=lambda _: tuple(trace))

    others = {"torch.cat": Contender(lambda _: exact())}
    return experiment("kv_append", "forward", case, device, ours, others, exact, ("keys", "values"))


def append_backward(case: Append, device: str) -> Experiment:
    """The gradient of the new keys and values out of the accumulators."""
    shape = (case.batch, case.kv_heads, case.prefix + case.new, case.head_dim)
    accumulators = [normal(*shape, like=case, device=device, dtype=torch.float32) for _ in range(2)]
    begin = int32([b * case.new for b in range(case.batch)], device)
    rows = RowRanges(begin, begin + case.new, torch.full_like(begin, case.prefix), case.new, shape[2])
    dtype = getattr(torch, case.dtype)

    def exact():
        return tuple(x[:, :, case.prefix :].transpose(1, 2).flatten(0, 1).to(dtype) for x in accumulators)

    def ours(ops, _):
        return Contender(lambda _: ops.kv_gather(*accumulators, rows, case.batch * case.new, dtype))

    others = {"slice and copy": Contender(lambda _: exact())}
    return experiment("kv_append", "backward", case, device, ours, others, exact, ("grad k", "grad v"))


def _concat_plan(case: Concat, device: str):
    """Row ranges of whole senders one after the other, and the angles of their moves, `cos, sin [n, D / 2]`."""
    senders = range(case.senders)
    table = [[[value] * case.batch for value in values] for values in (
        [0] * case.senders, [case.columns] * case.senders, [i * case.columns for i in senders]
    )]  # fmt: skip
    ranges = int32(table, device).unbind(0)
    frequencies = 10000.0 ** (-torch.arange(0, case.head_dim, 2, dtype=torch.float64) / case.head_dim)
    angles = torch.tensor([i * case.columns for i in senders], dtype=torch.float64)[:, None] * frequencies
    return ranges, angles.cos().to(device), angles.sin().to(device)


def _whole(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines or sines of both halves of the head dim, as transformers lays them out."""
    return angles.repeat(1, 2).to(dtype)


def _per_row(angles: Tensor, batch: int) -> Tensor:
    return angles.float()[:, None].expand(-1, batch, -1).contiguous()


def concat_forward(case: Concat, device: str) -> Experiment:
    shape = (case.layers, case.batch, case.kv_heads, case.columns, case.head_dim)
    keys, values = ([normal(*shape, like=case, device=device) for _ in range(case.senders)] for _ in range(2))
    ranges, cos, sin = _concat_plan(case, device)
    dtype = keys[0].dtype

    def ours(ops, _):
        plan = (*ranges, _per_row(cos, case.batch), _per_row(sin, case.batch), False)

        def run(_):
            out = [keys[0].new_empty(*shape[:3], case.senders * case.columns, case.head_dim) for _ in range(2)]
            ops.kv_concat(keys, values, *out, *plan)
            return out

        return Contender(run)

    def exact():
        wide = [[x.double() for x in xs] for xs in (keys, values)]
        return peers.concat(*wide, _whole(cos, torch.float64), _whole(sin, torch.float64))

    angles = _whole(cos, dtype), _whole(sin, dtype)
    others = {"torch.cat + eager rotation": Contender(lambda _: peers.concat(keys, values, *angles))}
    return experiment("kv_concat", "forward", case, device, ours, others, exact, ("keys", "values"))


def concat_backward(case: Concat, device: str) -> Experiment:
    shape = (case.layers, case.batch, case.kv_heads, case.columns, case.head_dim)
    whole = (*shape[:3], case.senders * case.columns, case.head_dim)
    grads = [normal(*whole, like=case, device=device, dtype=torch.float32) for _ in range(2)]
    ranges, cos, sin = _concat_plan(case, device)
    outputs = tuple(f"grad {name} of sender {i}" for name in ("keys", "values") for i in range(case.senders))

    def ours(ops, _):
        plan = (*ranges, _per_row(cos, case.batch), _per_row(sin, case.batch), False)
        keys, values = ([torch.zeros(shape, device=device) for _ in range(case.senders)] for _ in range(2))

        def prepare():
            for accumulator in (*keys, *values):
                accumulator.zero_()

        return Contender(
            lambda _: ops.kv_concat_backward(*grads, keys, values, *plan), prepare, lambda _: (*keys, *values)
        )

    def eager(dtype: torch.dtype):
        keys, values = ([torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
                         for _ in range(case.senders)] for _ in range(2))  # fmt: skip
        out = peers.concat(keys, values, _whole(cos, dtype), _whole(sin, dtype))
        return out, [*keys, *values], [g.to(dtype) for g in grads]

    # Gradients are float32 numbers on our side whatever the trace's dtype, so plain PyTorch gets the same.
    others = {"torch.cat + eager rotation": Contender(gradients, lambda: eager(torch.float32))}
    return experiment(
        "kv_concat", "backward", case, device, ours, others, lambda: gradients(eager(torch.float64)), outputs
    )


def _states(case: Project, device: str):
    hidden, grad = (normal(case.rows, case.hidden, like=case, device=device) for _ in range(2))
    weight = normal(case.hidden, case.hidden, like=case, device=device) * case.hidden**-0.5 if case.weight else None
    return hidden, weight, grad


def project_forward(case: Project, device: str) -> Experiment:
    hidden, weight, _ = _states(case, device)

    def ours(ops, _):
        return Contender(lambda _: ops.latent_project(hidden, weight, _TARGET_NORM), read=lambda result: result[:1])

    def exact():
        return (peers.project(hidden.double(), None if weight is None else weight.double(), _TARGET_NORM),)

    others = {"matmul + eager rescale": Contender(lambda _: (peers.project(hidden, weight, _TARGET_NORM),))}
    return experiment("latent_project", "forward", case, device, ours, others, exact, ("out",))


def project_backward(case: Project, device: str) -> Experiment:
    hidden, weight, grad = _states(case, device)
    wanted = 1 + case.weight

    def eager(dtype: torch.dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight) if x is not None]
        out = peers.project(leaves[0], leaves[1] if case.weight else None, _TARGET_NORM)
        return [out], leaves, [grad.to(dtype)]

    def ours(ops, _):
        saved = ops.latent_project(hidden, weight, _TARGET_NORM)
        return Contender(
            lambda _: ops.latent_project_backward(grad, hidden, weight, *saved, _TARGET_NORM, case.weight),
            read=lambda result: result[:wanted],
        )

    others = {"matmul + eager rescale": Contender(gradients, lambda: eager(hidden.dtype))}
    exact = lambda: gradients(eager(torch.float64))  # noqa: E731
    outputs = ("grad hidden", "grad Wₐ")[:wanted]
    return experiment("latent_project", "backward", case, device, ours, others, exact, outputs)


def _vocabulary(case: Expect, device: str):
    hidden, grad = (normal(case.rows, case.hidden, like=case, device=device) for _ in range(2))
    keys = normal(case.vocab, case.hidden, like=case, device=device) * case.hidden**-0.5
    values = keys if case.tied else normal(case.vocab, case.hidden, like=case, device=device)
    return hidden, keys, values, grad, torch.full((1,), _TEMPERATURE, device=device)


def expect_forward(case: Expect, device: str) -> Experiment:
    hidden, keys, values, _, temperature = _vocabulary(case, device)

    def ours(ops, _):
        given = (hidden, keys, values, None, temperature, 1.0, None)
        return Contender(lambda _: ops.expected_embedding(*given), read=lambda result: result[:1])

    def eager(*given: Tensor):
        return (peers.expect(*given, _TEMPERATURE),)

    others = {"matmul, softmax, matmul": Contender(lambda _: eager(hidden, keys, values))}
    exact = lambda: eager(*(x.double() for x in (hidden, keys, values)))  # noqa: E731
    return experiment("expected_embedding", "forward", case, device, ours, others, exact, ("out",))


def expect_backward(case: Expect, device: str) -> Experiment:
    hidden, keys, values, grad, temperature = _vocabulary(case, device)

    def eager(dtype: torch.dtype):
        leaf = hidden.detach().to(dtype).requires_grad_()
        return [peers.expect(leaf, keys.to(dtype), values.to(dtype), _TEMPERATURE)], [leaf], [grad.to(dtype)]

    def ours(ops, _):
        given = (hidden, keys, values, None, temperature)
        saved = ops.expected_embedding(*given, 1.0, None)
        return Contender(
            lambda _: ops.expected_embedding_backward(grad, *given, *saved, 1.0, None), read=lambda result: result[:1]
        )

    others = {"matmul, softmax, matmul": Contender(gradients, lambda: eager(hidden.dtype))}
    exact = lambda: gradients(eager(torch.float64))  # noqa: E731
    return experiment("expected_embedding", "backward", case, device, ours, others, exact, ("grad hidden",))


def merge_forward(case: Merge, device: str) -> Experiment:
    outs = normal(case.splits, case.tokens, case.heads, case.head_dim, like=case, device=device)
    lses = normal(*outs.shape[:3], like=case, device=device, dtype=torch.float32)

    def eager(outs, lses):
        return ((lses.softmax(0).unsqueeze(-1).to(outs.dtype) * outs).sum(0), lses.logsumexp(0))

    return experiment(
        "merge_states", "forward", case, device,
        lambda ops, _: Contender(lambda _: ops.merge_states(outs, lses)),
        {"eager softmax": Contender(lambda _: eager(outs, lses))},
        lambda: eager(outs.double(), lses.double()), ("out", "lse"),
    )  # fmt: skip
