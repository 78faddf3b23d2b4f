"""Experiments of attention over a trace: one call, and runs of latent steps; forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import Attention, LatentRollout
from benchmarks.contest import experiment, gradients, int32, normal
from benchmarks.experiment import Contender, Experiment
from diffmas_ops import KVTrace, backends, cached_attention
from diffmas_ops.rows import ColumnRanges, Pending, RowRanges
from diffmas_ops.scores import Scores
from diffmas_ops.storage import Stack, TraceStorage

_GRADIENTS = ("grad q", "grad keys", "grad values")


def _packed(x: Tensor) -> Tensor:
    """`[B, H, n, D]` to `[B · n, H, D]`."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _unpacked(x: Tensor, batch: int) -> Tensor:
    """The inverse of :func:`_packed`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _attention_inputs(case: Attention, device: str) -> SimpleNamespace:
    """Dense `q, k, v, past_k, past_v, grad` for the peers; packed ones, a trace and its row ranges for us."""
    options = dict(like=case, device=device)
    x = SimpleNamespace(B=case.batch, n=case.new, P=case.prefix, C=case.columns)
    x.q, x.grad = (normal(x.B, case.heads, x.n, case.head_dim, **options) for _ in range(2))
    x.k, x.v = (normal(x.B, case.kv_heads, x.n, case.head_dim, **options) for _ in range(2))
    x.past = tuple(normal(x.B, case.kv_heads, x.P, case.head_dim, **options) for _ in range(2))
    x.trace = tuple(torch.cat(pair, 2) for pair in zip(x.past, (x.k, x.v), strict=True))
    x.packed_q, x.packed_grad, x.packed_k, x.packed_v = map(_packed, (x.q, x.grad, x.k, x.v))
    x.begin = int32([b * x.n for b in range(x.B)], device)
    x.rows = RowRanges(x.begin, x.begin + x.n, torch.full_like(x.begin, x.P), x.n, x.C)
    x.scoring = Scores(case.head_dim**-0.5)
    x.scores = 4.0 * case.heads * x.n * x.C * 3
    return x


def _attention_peers(case: Attention, device: str) -> dict[str, peers.Attend | str]:
    compiled = case.new > 1 and case.prefix in (0, 8192) and not isinstance(case, LatentRollout)
    found = peers.attention(device, compiled=compiled)
    return {f"torch.cat + {name}": attend for name, attend in found.items()}


def _contenders(found: dict[str, peers.Attend | str], make: Callable[[peers.Attend], Contender]) -> dict:
    return {name: attend if isinstance(attend, str) else make(attend) for name, attend in found.items()}


def _call(x: SimpleNamespace, ops) -> tuple[Tensor, Tensor]:
    return ops.cached_attention(x.packed_q, x.packed_k, x.packed_v, *x.trace, x.rows, x.scoring)


def forward(case: Attention, device: str) -> Experiment:
    """Append and attend; a peer concatenates and attends."""
    x = _attention_inputs(case, device)

    def ours(ops, _):
        return Contender(lambda _: _call(x, ops), read=lambda result: (_unpacked(result[0], x.B),))

    make = _peer_forward(x, [slice(0, x.n)])
    return experiment(
        "cached_attention", "forward", case, device, ours, _contenders(_attention_peers(case, device), make),
        lambda: peers.exact_attention(x.q, *x.trace), ("out",), reference_bytes=x.scores,
    )  # fmt: skip


def _peer_calls(x: SimpleNamespace, attend: peers.Attend, steps: list[slice]):
    """Calls over the new tokens `steps`, each with its own concatenation: outputs and the inputs they depend on."""
    leaves = [t.detach().requires_grad_() for t in (x.q, *x.past, x.k, x.v)]
    q, keys, values, k, v = leaves
    outs = []
    for at in steps:
        keys, values = torch.cat((keys, k[:, :, at]), 2), torch.cat((values, v[:, :, at]), 2)
        outs.append(attend(q[:, :, at], keys, values))
    return outs, leaves


def _peer_forward(x: SimpleNamespace, steps: list[slice]) -> Callable[[peers.Attend], Contender]:
    def read(result):
        return (torch.cat([out.detach() for out in result[0]], 2),)

    return lambda attend: Contender(lambda _: _peer_calls(x, attend, steps), read=read)


def _peer_backward(x: SimpleNamespace, steps: list[slice], timed: bool = True, own: bool = False):
    """`own`: read the gradients of the new keys and values alone."""

    def make(attend) -> Contender:
        def prepare():
            outs, leaves = _peer_calls(x, attend, steps)
            return outs, leaves, [x.grad[:, :, at] for at in steps]

        def read(grads):
            q, past_k, past_v, k, v = grads
            return (q, k, v) if own else (q, torch.cat((past_k, k), 2), torch.cat((past_v, v), 2))

        return Contender(gradients, prepare, read, timed)

    return make


def backward(case: Attention, device: str) -> Experiment:
    """Gradient of the queries, of all columns into the accumulators, and of the call's own columns out of them."""
    x = _attention_inputs(case, device)
    zero = torch.zeros_like(x.begin)
    accumulators = tuple(torch.zeros(t.shape, device=device) for t in x.trace)

    def ours(ops, name):
        append = backends.functions("kv_append", x.q, name if name != "flash" else "auto")
        out, lse = _call(x, ops)

        def prepare():
            for accumulator in accumulators:
                accumulator.zero_()

        def run(_):
            grad_q, delta = ops.cached_attention_backward_queries(
                x.packed_grad, x.packed_q, out, lse, *x.trace, x.rows, x.scoring
            )
            ops.cached_attention_backward_columns(
                x.packed_grad, x.packed_q, lse, delta, *x.trace, *accumulators, x.rows,
                ColumnRanges(zero, zero + x.C), x.scoring,
            )  # fmt: skip
            append.kv_gather(*accumulators, x.rows, x.B * x.n, x.q.dtype)
            return grad_q

        return Contender(run, prepare, lambda grad_q: (_unpacked(grad_q, x.B), *accumulators))

    make = _peer_backward(x, [slice(0, x.n)])
    return experiment(
        "cached_attention", "backward", case, device, ours, _contenders(_attention_peers(case, device), make),
        lambda: peers.exact_attention(x.q, *x.trace, x.grad), _GRADIENTS,
        reference_bytes=2 * x.scores,
    )  # fmt: skip


def token_backward(case: Attention, device: str) -> Experiment:
    """What a latent step's own backward does; the rest of it is deferred (see the latent rollout for the whole)."""
    x = _attention_inputs(case, device)
    accumulators = tuple(torch.zeros(t.shape, device=device) for t in x.trace)

    def ours(ops, _):
        out, lse = _call(x, ops)
        pending = [torch.zeros(x.B, 1, *x.packed_q.shape[1:], dtype=x.q.dtype, device=device) for _ in range(2)]
        pending += [torch.zeros(x.B, 1, x.packed_q.shape[1], device=device) for _ in range(2)]
        deferred = Pending(*pending, x.rows.starts)
        return Contender(
            lambda _: ops.cached_attention_backward_token(
                x.packed_grad, x.packed_q, out, lse, *x.trace, *accumulators, deferred, x.rows, x.scoring
            ),
            read=lambda grads: tuple(_unpacked(g, x.B) for g in grads),
        )

    def exact():
        grad_q, grad_keys, grad_values = peers.exact_attention(x.q, *x.trace, x.grad)
        return grad_q, *(whole[:, :, x.P :].clone() for whole in (grad_keys, grad_values))

    make = _peer_backward(x, [slice(0, 1)], timed=False, own=True)
    return experiment(
        "cached_attention", "token backward", case, device, ours, _contenders(_attention_peers(case, device), make),
        exact, ("grad q", "grad k", "grad v"),
    )  # fmt: skip


def _latent_start(x: SimpleNamespace, backend: str):
    """A trace that already holds the prefix (gradients reach it too), and the inputs of the steps."""
    keys, values = (t[None].clone() for t in x.trace)
    trace = KVTrace(TraceStorage([Stack(keys, values)]), [0] * x.B, grow=False, backend=backend)
    trace.host_lengths, trace.lengths = [x.P] * x.B, x.rows.starts.clone()
    return trace, [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]


def _latent_steps(state):
    trace, leaves = state
    outs = []
    for step in zip(*(leaf.unbind(2) for leaf in leaves), strict=True):
        outs.append(cached_attention(*step, trace.open(1), layer=0))
    return outs, leaves, trace


def _latent_rollout(case: LatentRollout, direction: str, device: str, ours, peer, exact, outputs) -> Experiment:
    return experiment(
        "latent rollout", direction, case, device, ours, _contenders(_attention_peers(case, device), peer), exact,
        outputs, kernels="cached_attention",
    )  # fmt: skip


def latent_forward(case: LatentRollout, device: str) -> Experiment:
    """The calls of a run of latent steps, one after the other, as autograd records them."""
    x = _attention_inputs(case, device)

    def ours(_, name):
        return Contender(
            _latent_steps,
            lambda: _latent_start(x, name),
            lambda result: (torch.stack([out.detach() for out in result[0]], 2),),
        )

    peer = _peer_forward(x, [slice(t, t + 1) for t in range(x.n)])
    return _latent_rollout(case, "forward", device, ours, peer, lambda: peers.exact_attention(x.q, *x.trace), ("out",))


def latent_backward(case: LatentRollout, device: str) -> Experiment:
    """The whole backward of a run of latent steps, the flush of its deferred rows included."""
    x = _attention_inputs(case, device)
    grads = x.grad.unbind(2)

    def ours(_, name):
        def run(state):
            outs, leaves, trace = state
            result = gradients((outs, leaves, grads))
            trace.gradients.flush(0, trace.lengths, x.C)
            return result, trace

        def read(result):
            (grad_q, grad_k, grad_v), trace = result
            past = [t[0, :, :, : x.P] for t in trace.gradients.accumulators()[0]]
            return (grad_q, *(torch.cat(pair, 2) for pair in zip(past, (grad_k, grad_v), strict=True)))

        return Contender(run, lambda: _latent_steps(_latent_start(x, name)), read)

    peer = _peer_backward(x, [slice(t, t + 1) for t in range(x.n)])
    exact = partial(peers.exact_attention, x.q, *x.trace, x.grad)
    return _latent_rollout(case, "backward", device, ours, peer, exact, _GRADIENTS)
