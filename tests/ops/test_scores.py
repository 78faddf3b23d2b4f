"""Windows, chunks, soft caps, sinks and small values through the public operator, against each row alone with a mask
made column by column (`oracle.attend`), in float64: results and every gradient, single-token runs deferred."""

import itertools

import pytest
import torch
from compare import error
from oracle import attend

import diffmas_ops as ops
from diffmas_ops.scores import Scores

TOLERANCE = 1e-10
HEADS, KV_HEADS, DIM, BATCH, COLUMNS = 4, 2, 8, 3, 40
#: A prompt, a run of latent steps that not every row takes, a longer call that flushes them, another run.
PLAN = [[7, 0, 12], [1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1], [9, 4, 2], [1, 1, 1], [0, 1, 1]]
KINDS = [
    {},
    *(dict(window=n) for n in (1, 4, 11, 100)),
    *(dict(chunk=n) for n in (1, 5, 8, 100)),
    *(dict(softcap=c) for c in (0.3, 20.0)),
    dict(sinks=True),
    dict(window=6, chunk=10),
    dict(window=9, chunk=4, softcap=0.6, sinks=True),
]
pytestmark = pytest.mark.usefixtures("poison")


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def inputs(value_dim=DIM):
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, value_dim))
    return [[normal(sum(n), *s, seed=9 * i + j) for j, s in enumerate(shapes)] for i, n in enumerate(PLAN)]


def with_sinks(kind):
    return kind | (dict(sinks=normal(HEADS, seed=99)) if kind.get("sinks") else {})


def trace(backend):
    return ops.KVTrace.allocate(
        num_layers=1, batch=BATCH, num_kv_heads=KV_HEADS, capacity=COLUMNS, head_dim=DIM, dtype=torch.float64,
        backend=backend,
    )  # fmt: skip


def rows_alone(calls, kinds):
    """The same calls by the oracle, `kinds` one for each of them."""
    split = [[x.split(n) for x in qkv] for qkv, n in zip(calls, PLAN, strict=True)]
    outs = [[None] * BATCH for _ in PLAN]
    for row in range(BATCH):
        k, v = (torch.cat([qkv[i][row] for qkv in split]) for i in (1, 2))
        first = 0
        for i, (qkv, kind) in enumerate(zip(split, kinds, strict=True)):
            end = first + PLAN[i][row]
            outs[i][row] = attend(qkv[0][row], k[:end], v[:end], first, DIM**-0.5, **kind)
            first = end
    return [torch.cat(out) for out in outs]


def check(calls, kinds, backend):
    traces = trace(backend)
    got = [
        ops.cached_attention(*qkv, traces.open(n), layer=0, **kind)
        for qkv, n, kind in zip(calls, PLAN, kinds, strict=True)
    ]
    want = rows_alone(calls, kinds)
    leaves = [x for qkv in calls for x in qkv] + [kind["sinks"] for kind in kinds[:1] if "sinks" in kind]
    losses = [sum((i + 1) * out.sin().sum() for i, out in enumerate(outs)) for outs in (got, want)]
    grads = [torch.autograd.grad(loss, leaves) for loss in losses]
    for mine, exact in zip(got, want, strict=True):
        assert mine.shape == exact.shape and error(mine, exact, 1e-3) < TOLERANCE
    floor = 1e-5 * float(sum(g.square().sum() for g in grads[1])) ** 0.5
    for mine, exact in zip(*grads, strict=True):
        assert error(mine, exact, floor) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_results_and_gradients(kind, backend):
    kind = with_sinks(kind)
    check(inputs(), [kind] * len(PLAN), backend)


def test_every_call_has_its_own(backend):
    """Deferred rows of a run are flushed where the next call's scores are made in another way."""
    kinds = itertools.islice(itertools.cycle([dict(window=5), dict(softcap=0.5), {}, dict(chunk=6)]), len(PLAN))
    check(inputs(), list(kinds), backend)


@pytest.mark.parametrize("kind", [{}, KINDS[-1]], ids=str)
@pytest.mark.parametrize("value_dim", [1, 5])
def test_values_smaller_than_keys(value_dim, kind, backend):
    kind = with_sinks(kind)
    check(inputs(value_dim), [kind] * len(PLAN), backend)


def test_a_sink_of_minus_infinity_is_none(backend):
    calls, traces = inputs(), [trace(backend) for _ in range(2)]
    none, off = (
        ops.cached_attention(*calls[0], t.open(PLAN[0]), layer=0, sinks=sinks)
        for t, sinks in zip(traces, (None, torch.full((HEADS,), -torch.inf, dtype=torch.float64)), strict=True)
    )
    assert torch.equal(none, off)


def test_sinks_of_another_dtype():
    calls = inputs()
    sinks = normal(HEADS, seed=5).detach().float().requires_grad_()
    traces = trace("auto")
    out = ops.cached_attention(*calls[0], traces.open(PLAN[0]), layer=0, sinks=sinks)
    (grad,) = torch.autograd.grad(out.sum(), sinks)
    assert out.dtype == torch.float64 and grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change, error_type, message",
    [
        (dict(window=0), ValueError, "window is 0; allowed: integers ≥ 1"),
        (dict(window=2.5), TypeError, "float"),
        (dict(chunk=-1), ValueError, "chunk is -1; allowed: integers ≥ 1"),
        (dict(softcap=0.0), ValueError, "softcap is 0.0; allowed: finite numbers above 0"),
        (dict(softcap=float("nan")), ValueError, "softcap is nan"),
        (dict(sinks=torch.zeros(3)), ValueError, r"sinks has shape \(3,\); allowed: \[4\]"),
        (dict(sinks=torch.zeros(4).int()), TypeError, "sinks is torch.int32; allowed: floating-point"),
        (dict(sinks=torch.zeros(4, device="meta")), ValueError, "sinks is on meta; allowed: cpu"),
    ],
)
def test_refuses(change, error_type, message):
    with pytest.raises(error_type, match=message):
        ops.cached_attention(*inputs()[0], trace("auto").open(PLAN[0]), layer=0, **change)


@pytest.mark.parametrize("scores", [Scores(1.0), Scores(1.0, 3), Scores(1.0, None, None, 4), Scores(1.0, 6, None, 4)])
def test_what_queries_see_side_by_side(scores):
    """`first_seen` and `reach`, which plans are made with, against `sees`, which is what is computed."""
    at = torch.arange(30)
    seen = scores.sees(at[:, None], at)
    assert [int(row.nonzero()[0]) for row in seen] == [scores.first_seen(p) for p in range(30)]
    for count in (1, 2, 5):
        spans = [seen[p : p + count].any(0).sum() for p in range(30 - count + 1)]
        assert max(spans) <= scores.reach(count, 30) <= 30
    assert scores.reach(50, 30) == 30
