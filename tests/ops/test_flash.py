"""The `flash` backend: its batching, its split into prefix and new columns, its gradients.

On a GPU every installed engine is tested; elsewhere PyTorch's CPU kernel, which stands for the engines whose causal
mask has to be split.
"""

from dataclasses import replace

import pytest
import torch
from cases import (
    BACKWARD,
    DEVICE,
    FORWARD,
    Case,
    Problem,
    assert_within,
    cases,
    check_delta,
    logarithm_terms,
    plain_backward,
    plain_forward,
    score_terms,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmas_ops import KVTrace, cached_attention, flash_engines
from diffmas_ops.cached_attention import flash
from diffmas_ops.cached_attention import reference as attention
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.errors import UnsupportedError
from diffmas_ops.rows import ColumnRanges, RowRanges
from diffmas_ops.scores import Scores

DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float64)
USABLE = [
    name
    for name, engine in flash_engines.ENGINES.items()
    if engine.refusal(torch.empty(1, 64, dtype=DTYPES[0], device=DEVICE)) is None
]
CASES = {
    "uniform": Case((6, 6, 6), (11, 11, 11), head_dim=64),
    "no prefix": Case((7, 7), (0, 0), 5, 1, head_dim=64),
    "ragged": Case((3, 3, 0, 8), (20, 5, 4, 0), head_dim=64),
    "half alike": Case((4, 4, 5), (9, 9, 9), 2, 2, head_dim=64),
    "one row": Case((13,), (37,), head_dim=128),
}
each_engine = pytest.mark.parametrize("engine", USABLE)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(case, dtype, seed=0):
    problem = Problem(case, dtype, seed)
    double, mask, acc = problem.double(), problem.claimed, accumulation_dtype(dtype)
    arguments = (double.q, None, None, double.keys, double.values, problem.rows, problem.scores)
    exact, exact_lse = attention.cached_attention(*arguments)
    keys, values = (x.clone() for x in (problem.keys, problem.values))
    for row, start in enumerate(case.starts):
        keys[row, :, start:] = values[row, :, start:] = torch.nan
    out, lse = flash.cached_attention(problem.q, problem.k, problem.v, keys, values, problem.rows, problem.scores)
    assert out.dtype == dtype and lse.dtype == acc
    plain_lse = attention.cached_attention(
        problem.q, None, None, problem.keys, problem.values, problem.rows, problem.scores
    )[1]
    assert_within("out", out[mask], plain_forward(problem)[mask], exact[mask], FORWARD)
    assert_within("lse", lse[mask], plain_lse[mask], exact_lse[mask], FORWARD, logarithm_terms(exact_lse[mask]))

    low, low_lse, rows = exact.to(dtype), exact_lse.to(acc), (problem.rows, problem.columns)
    best_q, delta = attention.cached_attention_backward_queries(double.grad, double.q, exact, exact_lse, *arguments[3:])
    best = [double.grad_keys.clone(), double.grad_values.clone()]
    attention.cached_attention_backward_columns(
        double.grad, double.q, exact_lse, delta, double.keys, double.values, *best, *rows, problem.scores,
    )  # fmt: skip
    inputs = (problem.grad, problem.q, low, low_lse, problem.keys, problem.values)
    got_q, got_delta = flash.cached_attention_backward_queries(*inputs, problem.rows, problem.scores)
    apart, together = ([problem.grad_keys.clone(), problem.grad_values.clone()] for _ in range(2))
    flash.cached_attention_backward_columns(
        problem.grad, problem.q, low_lse, delta.to(acc), problem.keys, problem.values, *apart, *rows,
        problem.scores,
    )  # fmt: skip
    fused_q = flash.cached_attention_backward(*inputs, *together, *rows, problem.scores)
    terms = score_terms(problem, exact)
    plain_q, *plain = plain_backward(problem, low_lse, delta.to(acc))
    for name, mine in (("grad_q", got_q), ("grad_q, fused", fused_q)):
        assert mine.dtype == dtype
        assert_within(name, mine[mask], plain_q[mask], best_q[mask], BACKWARD, terms)
    check_delta(problem, low, got_delta)
    for grads in (apart, together):
        for name, mine, theirs, exact_grad in zip(("grad_keys", "grad_values"), grads, plain, best, strict=True):
            assert_within(name, mine, theirs, exact_grad, BACKWARD, terms)


@each_engine
@each_dtype
@each_case
def test_forward_and_backward(case, dtype, engine, monkeypatch):
    monkeypatch.setenv(flash_engines.VARIABLE, engine)
    check(case, dtype)


@given(case=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16))
@settings(max_examples=40 if DEVICE == "cpu" else 10)
def test_random_tables(case, dtype, seed):
    check(case if DEVICE == "cpu" else Case(case.new, case.starts, case.heads, case.kv_heads, 64), dtype, seed)


@each_engine
def test_deferred_rows_and_windows_of_columns(engine, monkeypatch):
    """Queries behind every column, one of them a hole, and a different window of columns in every row."""
    monkeypatch.setenv(flash_engines.VARIABLE, engine)
    torch.manual_seed(0)
    dtype = DTYPES[-1]
    acc, case = accumulation_dtype(dtype), Case((5, 5, 5), (2**20,) * 3, head_dim=64)
    q, grad = (torch.randn(15, 4, 64, device=DEVICE).to(dtype) for _ in range(2))
    keys, values = (torch.randn(3, 2, 40, 64, device=DEVICE).to(dtype) for _ in range(2))
    scores, _ = attention._scores(q.double(), keys[0].double(), 2**20, 0, Scores(case.scale))
    lse = scores.logsumexp(-1).flatten(0, 1).T.contiguous()
    delta = torch.randn(15, 4, dtype=torch.float64, device=DEVICE)
    q[3], grad[3], lse[3], delta[3] = 0, 0, torch.inf, 0
    begin = torch.tensor([0, 5, 10], dtype=torch.int32, device=DEVICE)
    low, high = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 3, 0], [40, 29, 0]))
    rows = RowRanges(begin, begin + 5, torch.full_like(begin, 40), 5, 40), ColumnRanges(low, high), Scores(case.scale)
    start = torch.randn(2, 3, 2, 40, 64, dtype=torch.float64, device=DEVICE)
    got, best = start.to(acc), start.clone()
    flash.cached_attention_backward_columns(grad, q, lse.to(acc), delta.to(acc), keys, values, *got, *rows)
    double = (x.double() for x in (grad, q, lse, delta, keys, values))
    attention.cached_attention_backward_columns(*double, *best, *rows)
    # What an engine returns is rounded to the dtype; here nothing plain is at hand to measure that against.
    limit = 8 * torch.finfo(dtype).eps * (best - start).norm()
    assert (got.double() - best).norm() <= limit + 8 * torch.finfo(acc).eps * best.norm()
    untouched = got[:, 1, :, [*range(3), *range(29, 40)]], got[:, 2]
    assert torch.equal(untouched[0], start.to(acc)[:, 1, :, [*range(3), *range(29, 40)]])
    assert torch.equal(untouched[1], start.to(acc)[:, 2])


def test_one_batch_for_rows_alike():
    problem = Problem(Case((4, 4, 5), (9, 9, 9)), torch.float32)
    q_begin = torch.tensor([0, 4, 8], dtype=torch.int32)
    q_end, starts = q_begin + torch.tensor([4, 4, 5], dtype=torch.int32), problem.rows[2].cpu()
    batches = flash._batches(q_begin, q_end, starts)
    assert [(b.first, b.last, b.begin, b.count) for b in batches] == [(0, 2, 0, 4), (2, 3, 8, 5)]
    assert flash._batches(q_begin, q_end, starts) is batches
    starts += 1
    assert flash._batches(q_begin, q_end, starts)[0].start == 10
    assert batches[0].columns(problem.keys, slice(0, 9)).data_ptr() == problem.keys.data_ptr()


@pytest.mark.parametrize(
    "engine, message",
    [
        ("flash-attn-2", "pip install flash-attn"),
        ("flash-attn-3", "hopper"),
        ("flash-attn-4", "pip install flash-attn-4"),
    ],
)
def test_missing_package_says_what_to_install(engine, message, monkeypatch):
    monkeypatch.setenv(flash_engines.VARIABLE, engine)
    monkeypatch.setattr(flash_engines, "_importable", lambda module: False)

    class OnGpu:
        is_cuda, dtype, device, shape = True, torch.bfloat16, torch.device("cuda"), (1, 64)

    with pytest.raises(UnsupportedError, match=message):
        flash_engines.choose(OnGpu())


def test_unknown_engine(monkeypatch):
    monkeypatch.setenv(flash_engines.VARIABLE, "flash-attn-1")
    with pytest.raises(UnsupportedError, match="is 'flash-attn-1'; allowed: flash-attn-2, "):
        flash_engines.choose(torch.empty(1, 64))


@pytest.mark.parametrize("how", [dict(window=2), dict(softcap=3.0), dict(chunk=2)], ids=str)
@pytest.mark.skipif(DEVICE == "cuda", reason="an installed engine may have them")
def test_what_no_engine_has_is_refused_by_name(how):
    trace = KVTrace.allocate(
        num_layers=1, batch=1, num_kv_heads=2, capacity=4, head_dim=64, device=DEVICE, dtype=DTYPES[0],
        backend="flash",
    )  # fmt: skip
    x = torch.zeros(3, 2, 64, device=DEVICE, dtype=DTYPES[0])
    message = f"'flash' cannot run cached_attention: .*cpu: it has no {next(iter(how))}"
    with pytest.raises(UnsupportedError, match=message):
        cached_attention(x, x, x, trace.open(3), layer=0, **how)


def aligned_scores(q, k, how):
    """As flash-attn documents `window_size` and `softcap`: aligned to the last query and the last column."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * how.scale
    if how.softcap:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    left, right = how.window
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    for i in range(q.shape[2]):
        for j in range(k.shape[2]):
            at = i + k.shape[2] - q.shape[2]
            hidden[i, j] = (left >= 0 and j < at - left) or (right >= 0 and j > at + right)
    return scores.masked_fill(hidden, -torch.inf)


def aligned_forward(q, k, v, how):
    scores = aligned_scores(q, k, how)
    return scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // k.shape[1], 1), scores.logsumexp(-1)


def aligned_backward(grad, q, k, v, out, lse, how):
    """From the given log-sum-exp and output, as an engine's backward has them."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        p = (aligned_scores(*leaves[:2], how) - lse.unsqueeze(-1)).exp()
        delta = (grad * out).sum(-1, keepdim=True)
        values = leaves[2].repeat_interleave(q.shape[1] // k.shape[1], 1)
        grad_p = (grad @ values.detach().mT - delta).detach()
        # Probabilities are differentiated as exponentials of the scores alone.
        loss = (p * grad_p).sum() + (p.detach() @ values * grad).sum()
    return torch.autograd.grad(loss, leaves)


@pytest.fixture
def aligned(monkeypatch):
    """In place of a package's engine, which needs a GPU: its documented behaviour in float64."""
    engine = flash_engines._Cpu(aligned_forward, aligned_backward, True, serves=("window", "softcap"))
    monkeypatch.setitem(flash_engines.ENGINES, "cpu", engine)


@pytest.mark.parametrize("how", [dict(window=1), dict(window=6), dict(window=50), dict(softcap=0.6, window=9)], ids=str)
@pytest.mark.parametrize("case", [*CASES.values()][:-1], ids=[*CASES][:-1])
@pytest.mark.skipif(DEVICE == "cuda", reason="the engine is a CPU's")
def test_windows_of_aligned_engines(case, how, aligned):
    check(replace(case, head_dim=16, **how), torch.float64)


@pytest.mark.parametrize("window", [3, 9, 30, 100])
@pytest.mark.skipif(DEVICE == "cuda", reason="the engine is a CPU's")
def test_deferred_rows_with_a_window(window, aligned):
    """Queries behind every column; the last of them see none of it any more."""
    p, scores = Problem(Case((12, 12), (20, 20), window=window), torch.float64), Scores(0.3, window)
    out, lse = attention.cached_attention(p.q, None, None, p.keys, p.values, p.rows, scores)
    delta, columns = (out * p.grad).sum(-1), ColumnRanges(p.rows.starts * 0 + 4, p.rows.starts)
    got, want = ([p.grad_keys.clone(), p.grad_values.clone()] for _ in range(2))
    for function, grads in ((flash, got), (attention, want)):
        function.cached_attention_backward_columns(
            p.grad, p.q, lse, delta, p.keys, p.values, *grads, p.rows, columns, scores
        )
    for mine, exact in zip(got, want, strict=True):
        assert_within("accumulator", mine, exact, exact, BACKWARD)
