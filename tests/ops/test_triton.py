"""The Triton operators against float64 references: natively where there is a GPU, through the interpreter elsewhere.

Errors are measured against the reference in float64 and may be twice (gradients: three times) those of plain PyTorch
in the dtype under test.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cases import (
    BACKWARD,
    DEVICE,
    DTYPES,
    FORWARD,
    KINDS,
    RAGGED,
    SINGLE,
    Case,
    Problem,
    assert_within,
    cases,
    check_delta,
    check_without_some_tokens,
    indices,
    logarithm_terms,
    plain_backward,
    plain_forward,
    random,
    score_terms,
    strided,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmas_ops import triton_device
from diffmas_ops.cached_attention import reference as attention
from diffmas_ops.cached_attention import tiles
from diffmas_ops.cached_attention import triton as attention_triton
from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.expected_embedding import reference as expected
from diffmas_ops.expected_embedding import triton as expected_triton
from diffmas_ops.kv_append import reference as append
from diffmas_ops.kv_append import triton as append_triton
from diffmas_ops.kv_concat import reference as concat
from diffmas_ops.kv_concat import triton as concat_triton
from diffmas_ops.latent_project import reference as latent
from diffmas_ops.latent_project import triton as latent_triton
from diffmas_ops.merge_states import reference as merge
from diffmas_ops.merge_states import triton as merge_triton
from diffmas_ops.need import Need
from diffmas_ops.rows import ColumnRanges, Pending, RowRanges
from diffmas_ops.scores import Scores

REFUSAL = triton_device.refusal(Need("cached_attention", DEVICE, torch.float32))
pytestmark = [
    pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)),
    # Merging the parts of tokens that no row claims computes with whatever memory held.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning:triton.runtime.interpreter"),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SCORED = {f"{kind}, {name}": c for kind, group in KINDS.items() for name, c in group.items()}
# Every case in one of the types, every type in many cases: the interpreter is slow.
each_scores = pytest.mark.parametrize(
    "case, dtype", [(case, DTYPES[i % len(DTYPES)]) for i, case in enumerate(SCORED.values())], ids=SCORED
)
each_case = pytest.mark.parametrize("case", RAGGED.values(), ids=RAGGED)


def same(a, b):
    """Bit for bit, poison included."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def check_forward(case, dtype, seed=0):
    problem = Problem(case, dtype, seed)
    double = problem.double()
    exact, exact_lse = attention.cached_attention(
        double.q, None, None, double.keys, double.values, problem.rows, problem.scores
    )
    _, plain_lse = attention.cached_attention(
        problem.q, None, None, problem.keys, problem.values, problem.rows, problem.scores
    )
    # The trace as the call finds it: nothing at the new columns.
    keys, values = (x.clone() for x in (problem.keys, problem.values))
    for row, start in enumerate(case.starts):
        keys[row, :, start:] = values[row, :, start:] = torch.nan
    out, lse = attention_triton.cached_attention(
        problem.q, problem.k, problem.v, keys, values, problem.rows, problem.scores
    )
    assert same(keys, problem.keys) and same(values, problem.values)
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.is_contiguous()
    mask = problem.claimed
    assert_within("out", out[mask], plain_forward(problem)[mask], exact[mask], FORWARD)
    assert_within("lse", lse[mask], plain_lse[mask], exact_lse[mask], FORWARD, logarithm_terms(exact_lse[mask]))


def check_backward(case, dtype, seed=0):
    problem = Problem(case, dtype, seed)
    double = problem.double()
    out, lse = attention.cached_attention(
        double.q, None, None, double.keys, double.values, problem.rows, problem.scores
    )
    exact = [double.grad_keys.clone(), double.grad_values.clone()]
    exact_q, exact_delta = attention.cached_attention_backward_queries(
        double.grad, double.q, out, lse, double.keys, double.values, problem.rows, problem.scores
    )
    attention.cached_attention_backward_columns(
        double.grad, double.q, lse, exact_delta, double.keys, double.values, *exact,
        problem.rows, problem.columns, problem.scores,
    )  # fmt: skip
    acc, mask = accumulation_dtype(dtype), problem.claimed
    low_out, low_lse, low_delta = out.to(dtype), lse.to(acc), exact_delta.to(acc)
    grad_q, delta = attention_triton.cached_attention_backward_queries(
        problem.grad, problem.q, low_out, low_lse, problem.keys, problem.values, problem.rows, problem.scores
    )
    plain_q, *plain = plain_backward(problem, low_lse, (low_out.to(acc) * problem.grad.to(acc)).sum(-1))
    assert grad_q.dtype == dtype and delta.dtype == acc and grad_q.is_contiguous()
    terms = score_terms(problem, out)
    assert_within("grad_q", grad_q[mask], plain_q[mask], exact_q[mask], BACKWARD, terms)
    check_delta(problem, low_out, delta)
    got = [problem.grad_keys.clone(), problem.grad_values.clone()]
    attention_triton.cached_attention_backward_columns(
        problem.grad, problem.q, low_lse, low_delta, problem.keys, problem.values, *got,
        problem.rows, problem.columns, problem.scores,
    )  # fmt: skip
    for name, mine, theirs, best in zip(("grad_keys", "grad_values"), got, plain, exact, strict=True):
        assert_within(name, mine, theirs, best, BACKWARD, terms)


@each_dtype
@each_case
def test_attention_forward(case, dtype):
    check_forward(case, dtype)


@each_dtype
@each_case
def test_attention_backward(case, dtype):
    check_backward(case, dtype)


@each_scores
def test_attention_with_other_scores(case, dtype):
    check_forward(case, dtype)
    check_backward(case, dtype)


@each_dtype
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_attention_head_dims(head_dim, dtype):
    case = Case((3, 19), (40, 2), head_dim=head_dim, scale=head_dim**-0.5)
    check_forward(case, dtype)
    check_backward(case, dtype)


@given(case=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16))
@settings(max_examples=12)
def test_attention_random_tables(case, dtype, seed):
    check_forward(case, dtype, seed)
    check_backward(case, dtype, seed)


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU's own tiles run in every other test")
@pytest.mark.parametrize("architecture", [80, 86, 90])
def test_tiles_of_gpus(architecture, monkeypatch):
    """The tile shapes meant for GPUs, through the interpreter."""
    monkeypatch.setattr(tiles, "architecture", lambda device: architecture)
    for case in (Case((150, 9), (140, 300), head_dim=64), Case((1, 1), (700, 90), heads=8, head_dim=128, scale=0.1)):
        check_forward(case, torch.float16)
        check_backward(case, torch.float16)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scale_that_is_not_positive(scale):
    case = Case((5, 9), (0, 30), scale=scale)
    check_forward(case, torch.float32)
    check_backward(case, torch.float32)


def test_head_dim_too_large():
    problem = Problem(Case((2,), (3,), head_dim=320), torch.float32)
    with pytest.raises(ValueError, match="head_dim is 320; allowed: at most 256"):
        attention_triton.cached_attention(
            problem.q, problem.k, problem.v, problem.keys, problem.values, problem.rows, problem.scores
        )


@each_case
def test_columns_between(case):
    """A window of columns: those outside are neither read nor written, and rows without one are left alone."""
    problem = Problem(case, torch.float32)
    first, last = problem.rows[2] // 3, problem.columns.end - (problem.rows[1] - problem.rows[0]) // 2
    for x in (problem.keys, problem.values):
        column = torch.arange(x.shape[2], device=DEVICE)
        outside = (column < first[:, None]) | (column >= last[:, None])
        x[outside[:, None].expand(x.shape[:3])] = torch.nan
    lse, delta = (torch.randn(problem.q.shape[:2], device=DEVICE) + 3 for _ in range(2))
    results = []
    for function, p, dtype in (
        (attention_triton, problem, torch.float32),
        (attention, problem, torch.float32),
        (attention, problem.double(), torch.float64),
    ):
        grads = [p.grad_keys.clone(), p.grad_values.clone()]
        function.cached_attention_backward_columns(
            p.grad, p.q, lse.to(dtype), delta.to(dtype), p.keys, p.values, *grads,
            p.rows, ColumnRanges(first, last), p.scores,
        )  # fmt: skip
        results.append(grads)
    for name, got, plain, exact in zip(("grad_keys", "grad_values"), *results, strict=True):
        assert_within(name, got, plain, exact, BACKWARD)


def deferred(slots, first, heads, kv_heads, dtype):
    """Pending rows of real queries behind 150 columns, slots before `first` unused, one hole."""
    batch, dim, columns = 2, 20, 150
    case = Case((slots,) * batch, (columns,) * batch, heads, kv_heads, dim)
    problem = Problem(case, torch.float64)
    keys, values = (strided(*x[:, :, :columns].shape, dtype=torch.float64) for x in (problem.keys, problem.values))
    keys.copy_(problem.keys[:, :, :columns])
    values.copy_(problem.values[:, :, :columns])
    tokens = [problem.q[problem.claimed], problem.grad[problem.claimed]]
    q, grad = (x.contiguous() for x in tokens)
    begins = torch.arange(batch, dtype=torch.int32, device=DEVICE) * slots
    starts = torch.full_like(begins, columns + first)
    rows = RowRanges(begins + first, begins + slots, starts, slots - first, columns)
    scores = torch.einsum("bnkgd,bkcd->bnkgc", q.view(batch, slots, kv_heads, -1, dim), keys) * case.scale
    lse = scores.logsumexp(-1).reshape(-1, heads)
    out = torch.einsum("bnkgc,bkcd->bnkgd", scores.softmax(-1), values).reshape(q.shape)
    delta = (out * grad).sum(-1)
    lse[slots - 1], delta[slots - 1] = torch.inf, 0
    q[slots - 1], grad[slots - 1] = 0, 0
    for x in (q, grad, lse, delta):
        x.view(batch, slots, -1)[:, :first] = torch.nan
    acc = accumulation_dtype(dtype)
    return (
        grad.to(dtype), q.to(dtype), lse.to(acc), delta.to(acc), keys.to(dtype), values.to(dtype), rows,
        Scores(case.scale),
    )  # fmt: skip


def plain_deferred(grad, q, lse, delta, keys, values, grad_keys, grad_values, first, scale):
    """The same with products and probabilities in the dtype, as plain PyTorch has them."""
    batch, groups = keys.shape[:2]
    q, grad, lse, delta = (
        x.unflatten(0, (batch, -1))[:, first:].unflatten(2, (groups, -1)).flatten(4).permute(0, 2, 3, 1, 4)
        for x in (q, grad, lse.unsqueeze(-1), delta.unsqueeze(-1))
    )
    p = torch.exp((q @ keys.unsqueeze(2).mT).to(lse.dtype) * scale - lse)
    grad_p = (grad @ values.unsqueeze(2).mT).to(p.dtype)
    grad_scores = (p * (grad_p - delta)).to(q.dtype)
    grad_keys += ((grad_scores.mT @ q) * scale).sum(2)
    grad_values += (p.to(q.dtype).mT @ grad).sum(2)


@each_dtype
@pytest.mark.parametrize("slots, first, heads, kv_heads", [(1, 0, 1, 1), (7, 2, 4, 2), (43, 0, 5, 1)])
def test_deferred_rows(slots, first, heads, kv_heads, dtype):
    """A flush: queries behind every column, a hole, slots before the first that were never written."""
    torch.manual_seed(1)
    *tensors, rows, scores = deferred(slots, first, heads, kv_heads, dtype)
    columns = ColumnRanges(indices(0, 3), indices(150, 141))
    shape, acc = tensors[4].shape, accumulation_dtype(dtype)
    start = [random(*shape, dtype=acc) for _ in range(2)]
    got, plain = ([x.clone() for x in start] for _ in range(2))
    best = [x.double() for x in start]
    attention_triton.cached_attention_backward_columns(*tensors, *got, rows, columns, scores)
    attention.cached_attention_backward_columns(*(x.double() for x in tensors), *best, rows, columns, scores)
    plain_deferred(*tensors, *plain, first, scores.softmax_scale)
    for mine, theirs, exact, untouched in zip(got, plain, best, start, strict=True):
        theirs[1, :, :3], theirs[1, :, 141:] = untouched[1, :, :3], untouched[1, :, 141:]
        assert_within("accumulator", mine, theirs, exact, BACKWARD)


@each_dtype
@pytest.mark.parametrize("slots, slot", [(1, 0), (6, 2), (41, 0), (5, 4)])
@pytest.mark.parametrize(
    "case", [*SINGLE.values(), *(group["single"] for group in KINDS.values())], ids=[*SINGLE, *KINDS]
)
def test_token_backward(case, slots, slot, dtype):
    check_token_backward(case, slots, slot, dtype)


def check_token_backward(case, slots, slot, dtype):
    """`slot` is the first row's; the last row has its token one slot earlier, where there is an earlier one."""
    problem = Problem(case, dtype)
    double, acc, mask = problem.double(), accumulation_dtype(dtype), problem.claimed
    out, lse = attention.cached_attention(
        double.q, None, None, double.keys, double.values, problem.rows, problem.scores
    )
    batch, shape = len(case.new), (len(case.new), slots, case.heads)
    own = torch.full((batch,), slot, dtype=torch.int32, device=DEVICE)
    own[-1] = max(slot - 1, 0)
    starts = problem.rows.starts - own
    pending = [random(*shape, case.head_dim, dtype=dtype), random(*shape, case.head_dim, dtype=dtype)]
    pending += [random(*shape, dtype=acc) + 5, random(*shape, dtype=acc)]
    for row, at in enumerate(own.tolist()):
        for x in pending:
            x[row, : at + 1] = torch.nan
    if slot + 1 < slots:
        for x, hole in zip(pending, (0, 0, torch.inf, 0), strict=True):
            x[0, slot + 1] = hole
    # Only the columns of the call's own tokens are read.
    grads = [torch.full_like(x, torch.nan) for x in (problem.grad_keys, problem.grad_values)]
    for row in range(batch):
        for x, source in zip(grads, (problem.grad_keys, problem.grad_values), strict=True):
            x[row, :, case.starts[row]] = source[row, :, case.starts[row]]

    def run(function, p, dtype, acc):
        copies = [x.clone().to(dtype if i < 2 else acc) for i, x in enumerate(pending)]
        results = function.cached_attention_backward_token(
            p.grad, p.q, out.to(problem.dtype).to(dtype), lse.to(acc), p.keys, p.values, *(g.to(acc) for g in grads),
            Pending(*copies, starts), problem.rows, problem.scores,
        )  # fmt: skip
        return [x[mask] for x in results] + [x[:, slot:] for x in copies]

    got, plain = (run(f, problem, dtype, acc) for f in (attention_triton, attention))
    exact = run(attention, double, torch.float64, torch.float64)
    delta = (out.to(dtype).to(acc) * problem.grad.to(acc)).sum(-1)
    eager_q = plain_backward(problem, lse.to(acc), delta)[0]
    plain[0] = eager_q[mask]
    names = ("grad_q", "grad_k", "grad_v", "pending_q", "pending_grad", "pending_lse", "pending_delta")
    for name, mine, theirs, best in zip(names, got, plain, exact, strict=True):
        assert_within(name, mine, theirs, best, BACKWARD, score_terms(problem, out))


@each_dtype
@each_case
def test_append_and_gather(case, dtype):
    problem = Problem(case, dtype)
    traces = [[torch.full_like(x, torch.nan) for x in (problem.keys, problem.values)] for _ in range(2)]
    for function, trace in zip((append_triton, append), traces, strict=True):
        function.kv_append(problem.k, problem.v, *trace, problem.rows)
    assert all(map(same, *traces))
    arguments = (problem.grad_keys, problem.grad_values, problem.rows, len(problem.k), dtype)
    for got, want in zip(append_triton.kv_gather(*arguments), append.kv_gather(*arguments), strict=True):
        assert same(got, want)


def check_concat(source, dest, rotary, interleaved, begin, counts, layers=2, kv_heads=2, dim=24, seed=0):
    torch.manual_seed(seed)
    begin, counts = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (begin, counts))
    dest_begin = (counts.cumsum(0) - counts + 1).int()
    batch, acc = begin.shape[1], accumulation_dtype(source)
    lengths = (begin + counts).amax(1).tolist()
    sources = [[random(layers, batch, kv_heads, n + 2, dim, dtype=source) for n in lengths] for _ in range(2)]
    shape = (layers, batch, kv_heads, int(counts.sum(0).max()) + 3, dim)
    angles = [None, None]
    if rotary:
        angle = torch.randn(len(begin), batch, rotary // 2, dtype=torch.float64, device=DEVICE)
        angles = [angle.cos().to(acc), angle.sin().to(acc)]
    grads = [random(*shape, dtype=acc) for _ in range(2)]
    source_grads = [[random(*x.shape, dtype=acc) for x in group] for group in sources]
    forward, backward = [], []
    for function, double in ((concat_triton, False), (concat, False), (concat, True)):

        def lift(x, double=double):
            if isinstance(x, list):
                return list(map(lift, x))
            return x.double() if double and x is not None else x.clone() if x is not None else None

        plan = (begin, counts, dest_begin, *lift(angles), interleaved)
        trace = [strided(*shape, dtype=torch.float64 if double else dest) for _ in range(2)]
        function.kv_concat(*lift(sources), *trace, *plan)
        forward.append(trace)
        accumulators = lift(source_grads)
        function.kv_concat_backward(*lift(grads), *accumulators, *plan)
        backward.append([x for group in accumulators for x in group])
    for got, plain, exact in zip(*forward, strict=True):
        assert_within("trace", got, plain, exact, FORWARD)
    for got, plain, exact in zip(*backward, strict=True):
        assert_within("source gradient", got, plain, exact, BACKWARD)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [None, 10, 16, 24])
@pytest.mark.parametrize("source, dest", [*zip(DTYPES, DTYPES, strict=True), (torch.float32, torch.float16)], ids=str)
def test_concat(source, dest, rotary, interleaved):
    check_concat(source, dest, rotary, interleaved, [[0, 2, 1], [3, 0, 7]], [[9, 0, 5], [70, 1, 0]])


@given(data=st.data(), dtype=st.sampled_from(DTYPES), interleaved=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=15)
def test_concat_random_tables(data, dtype, interleaved, seed):
    senders, batch = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    table = st.lists(
        st.lists(st.integers(0, 40), min_size=batch, max_size=batch), min_size=senders, max_size=senders
    )  # fmt: skip
    rotary = data.draw(st.sampled_from([None, 6, 24]))
    check_concat(dtype, dtype, rotary, interleaved, data.draw(table), data.draw(table), layers=1, seed=seed)


@each_dtype
@pytest.mark.parametrize("rows", [0, 1, 3, 37])
@pytest.mark.parametrize("size, weighted", [(64, True), (301, True), (77, False)])
def test_latent_project(rows, size, weighted, dtype):
    torch.manual_seed(0)
    hidden, grad = (random(rows, size, dtype=dtype) for _ in range(2))
    weight = random(size, size, dtype=dtype) if weighted else None
    if rows == 3:
        hidden[1] = 0
    double = [None if x is None else x.double() for x in (hidden, weight, grad)]
    got, plain = (f.latent_project(hidden, weight, 1.7) for f in (latent_triton, latent))
    exact = latent.latent_project(*double[:2], 1.7)
    for name, mine, theirs, best in zip(("out", "norm"), got, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert_within(name, mine, theirs, best, FORWARD)
    for need_weight in (False, True):
        arguments = (hidden, weight, *plain, 1.7, need_weight)
        got, plain_grads = (f.latent_project_backward(grad, *arguments) for f in (latent_triton, latent))
        lifted = (x.double() if isinstance(x, torch.Tensor) else x for x in arguments)
        best = latent.latent_project_backward(double[2], *lifted)
        for mine, theirs, exact_grad in zip(got, plain_grads, best, strict=True):
            assert mine.dtype == theirs.dtype
            assert_within("gradient", mine, theirs, exact_grad, BACKWARD)


@pytest.mark.parametrize(
    "rows, vocab, depth, width, biased, softcap, dtype",
    [
        (0, 5, 16, 16, True, None, torch.float32),
        (1, 1, 16, 16, False, None, torch.float32),
        (3, 70, 64, 64, False, None, torch.float16),
        (2, 513, 77, 130, True, None, torch.float32),
        # More rows than a block, several parts of the vocabulary, several blocks of a part.
        (19, 600, 40, 70, False, 2.5, torch.float32),
        (17, 500, 70, 40, True, 2.5, torch.float16),
        (17, 500, 70, 40, True, None, torch.bfloat16),
    ],
)
def test_expected_embedding(rows, vocab, depth, width, biased, softcap, dtype):
    if dtype not in DTYPES:
        pytest.skip(f"no {dtype} here")
    check_expected_embedding(rows, vocab, depth, width, biased, softcap, dtype)


def test_expected_embedding_without_some_tokens():
    check_without_some_tokens(expected_triton, torch.float32)


def check_expected_embedding(rows, vocab, depth, width, biased, softcap, dtype, grad_size=1.0):
    torch.manual_seed(0)
    hidden, keys, values = (random(*shape, dtype=dtype) for shape in ((rows, depth), (vocab, depth), (vocab, width)))
    bias = torch.randn(vocab).to(hidden) if biased else None
    grad_out = random(rows, width, dtype=dtype) * grad_size
    # One token that is far likelier than others, in the middle of a block.
    keys[vocab // 3] *= 3
    temperature = torch.tensor([0.7], dtype=accumulation_dtype(dtype), device=hidden.device)
    given = (hidden, keys, values, bias, temperature)
    lifted = [None if x is None else x.double() for x in given]
    got, plain = (f.expected_embedding(*given, 0.4, softcap) for f in (expected_triton, expected))
    exact = expected.expected_embedding(*lifted, 0.4, softcap)
    # Rounded logits are probabilities with a relative error of as much.
    logits = float(exact[0].norm() * exact[1].abs().max().nan_to_num()) if rows else 0.0
    for name, mine, theirs, best, more in zip(("out", "lse"), got, plain, exact, (logits, 0.0), strict=True):
        assert mine.dtype == theirs.dtype
        assert_within(name, mine, theirs, best, FORWARD, more)
    rest = (*plain, 0.4, softcap)
    got, plain_grads = (f.expected_embedding_backward(grad_out, *given, *rest) for f in (expected_triton, expected))
    best = expected.expected_embedding_backward(grad_out.double(), *lifted, *exact, 0.4, softcap)
    # The temperature's is a sum that may cancel: it is measured beside what it is a sum of.
    terms = float(((grad_out * plain[0]).double().abs().sum(1) * plain[1].double().abs()).sum())
    for name, mine, theirs, exact_grad, more in zip(
        ("grad_hidden", "grad_temperature"), got, plain_grads, best, (0.0, terms), strict=True
    ):
        assert mine.dtype == theirs.dtype
        assert_within(name, mine, theirs, exact_grad, BACKWARD, more)
    for function, arguments in (
        ("expected_embedding", (*given, 0.4, softcap)),
        ("expected_embedding_backward", (grad_out, *given, *rest)),
    ):
        first, again = (getattr(expected_triton, function)(*arguments) for _ in range(2))
        assert all(map(same, first, again))


@each_dtype
@pytest.mark.parametrize("sets", [1, 2, 7])
def test_merge_states(sets, dtype):
    torch.manual_seed(0)
    outs, lses = random(sets, 5, 3, 40, dtype=dtype), random(sets, 5, 3, dtype=torch.float32)
    lses *= 4
    lses[0, 0] = lses[:, 1] = -torch.inf
    outs[lses == -torch.inf] = torch.nan
    got, plain = (f.merge_states(outs, lses) for f in (merge_triton, merge))
    exact = merge.merge_states(outs.double(), lses.double())
    for name, mine, theirs, best in zip(("out", "lse"), got, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert_within(name, mine, theirs, best, FORWARD, logarithm_terms(best) if name == "lse" else 0.0)


def test_offsets_beyond_32_bits():
    """Columns more than 2³¹ elements apart: an offset in 32 bits would wrap."""
    case = Case((2,), (3,), heads=2, kv_heads=1)
    problem = Problem(case, torch.float16)
    apart = 2**29 + 16
    far = torch.empty(4 * apart + case.head_dim, dtype=torch.float16, device=DEVICE)
    keys = far.as_strided((1, 1, 5, case.head_dim), (1, 1, apart, 1))
    keys[:, :, :3] = problem.keys[:, :, :3]
    values = problem.values
    out, lse = attention_triton.cached_attention(
        problem.q, problem.k, problem.v, keys, values, problem.rows, problem.scores
    )
    want, want_lse = attention_triton.cached_attention(
        problem.q, None, None, problem.keys, values, problem.rows, problem.scores
    )
    mask = problem.claimed
    assert same(out[mask], want[mask]) and same(lse[mask], want_lse[mask])
    arguments = (want, want_lse), values, problem.rows, problem.scores
    grads = [
        attention_triton.cached_attention_backward_queries(problem.grad, problem.q, *arguments[0], k, *arguments[1:])
        for k in (keys, problem.keys)
    ]
    assert all(same(a[mask], b[mask]) for a, b in zip(*grads, strict=True))


def test_bit_repeatable():
    def everything():
        p = Problem(RAGGED["primes"], DTYPES[-1])
        out, lse = attention_triton.cached_attention(p.q, None, None, p.keys, p.values, p.rows, p.scores)
        grad_q, delta = attention_triton.cached_attention_backward_queries(
            p.grad, p.q, out, lse, p.keys, p.values, p.rows, p.scores
        )
        attention_triton.cached_attention_backward_columns(
            p.grad, p.q, lse, delta, p.keys, p.values, p.grad_keys, p.grad_values,
            p.rows, p.columns, p.scores,
        )  # fmt: skip
        return [x[p.claimed] for x in (out, lse, grad_q, delta)] + [p.grad_keys, p.grad_values]

    first = everything()
    for _ in range(100 if DEVICE == "cuda" else 3):
        assert all(map(same, everything(), first))
