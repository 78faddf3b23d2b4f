"""The CUDA operators against float64 references, on a GPU. `test_cuda_host.py` runs the same tests without one.

The checks are those of the Triton operators, with the head dims and alignments that choose the CUDA kernels: 64 to 256
in 16 bit for the tensor-core kernels, anything else for the simple ones.
"""

from dataclasses import replace

import cases
import pytest
import test_triton as suite
import torch
from cases import BACKWARD, RAGGED, Case, Problem, assert_within, indices, plain_backward, random, strided

from diffmas_ops import library
from diffmas_ops.cached_attention import reference as attention
from diffmas_ops.dtypes import SUPPORTED, accumulation_dtype
from diffmas_ops.kv_concat import reference as concat
from diffmas_ops.native import Functions
from diffmas_ops.rows import ColumnRanges, Pending

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(library.failure("cuda") is not None, reason=str(library.failure("cuda"))),
]
HALVES = (torch.bfloat16, torch.float16)
HEADS = {"mha": (2, 2), "gqa": (8, 2), "mqa": (5, 1), "more than a tile": (20, 1)}


def use(monkeypatch, operators):
    """Have the suite's checks call these operators; returns them with the reference's signatures."""
    operators = Functions(operators)
    for name in ("attention", "append", "concat", "latent", "expected", "merge"):
        monkeypatch.setattr(suite, f"{name}_triton", operators)
    return operators


@pytest.fixture(autouse=True)
def operators(monkeypatch):
    return use(monkeypatch, torch.ops.diffmas)


def sized(case, head_dim, heads="gqa"):
    query_heads, kv_heads = HEADS[heads]
    return replace(case, head_dim=head_dim, heads=query_heads, kv_heads=kv_heads, scale=head_dim**-0.5)


LONG = {
    "long single": Case((1, 0, 1, 1), (700, 40, 3, 129)),
    "long few": Case((3, 2), (640, 1)),
    # More chunks than slots, were the rounding of every row's last chunk forgotten.
    "long rows": Case((1, 1, 1), (999, 1099, 899)),
}
CASES = {**RAGGED, **LONG}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_attention(case, dtype):
    case = sized(CASES[case], 64)
    suite.check_forward(case, dtype)
    suite.check_backward(case, dtype)


@pytest.mark.parametrize("case", ["prefix", "some single", "long single"])
def test_attention_in_float64(operators, case):
    case = sized(CASES[case], 64)
    p = Problem(case, torch.float64)
    arguments = (p.q, None, None, p.keys, p.values, p.rows, p.scores)
    results = operators.cached_attention(*arguments), attention.cached_attention(*arguments)
    for name, got, exact in zip(("out", "lse"), *results, strict=True):
        assert got.dtype == torch.float64
        assert_within(name, got[p.claimed], exact[p.claimed], exact[p.claimed], 0.0)
    suite.check_backward(case, torch.float64)


@pytest.mark.parametrize("heads", ["mha", "mqa", "more than a tile"])
@pytest.mark.parametrize("case", ["prefix", "some single", "long single"])
def test_groups_of_heads(case, heads):
    case = sized(CASES[case], 64, heads)
    suite.check_forward(case, torch.bfloat16)
    suite.check_backward(case, torch.bfloat16)


@pytest.mark.parametrize(
    "dtype, head_dim", [*((torch.bfloat16, d) for d in (96, 128, 256, 40)), (torch.float16, 128), (torch.float32, 72)]
)
@pytest.mark.parametrize("new", [1, 19])
def test_head_dims(new, dtype, head_dim):
    case = sized(Case((new, 1), (140, 2)), head_dim)
    suite.check_forward(case, dtype)
    suite.check_backward(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("heads", HEADS)
def test_deferred_rows(operators, heads, head_dim, dtype):
    """A flush: queries behind every column, one of them a hole; columns outside the window are left alone."""
    case = sized(Case((13, 7), (150, 130)), head_dim, heads)
    problem = Problem(case, dtype)
    double, acc = problem.double(), accumulation_dtype(dtype)
    out, lse = attention.cached_attention(
        double.q, None, None, double.keys, double.values, problem.rows, problem.scores
    )
    delta, hole = (out * double.grad).sum(-1), int(problem.rows[0][1]) + 3
    for x, nothing in ((problem.q, 0), (problem.grad, 0), (lse, torch.inf), (delta, 0)):
        x[hole] = nothing
    double = problem.double()
    rows, columns, scores = problem.rows, ColumnRanges(indices(0, 5), problem.rows.starts), problem.scores
    got, exact = ([p.grad_keys.clone(), p.grad_values.clone()] for p in (problem, double))
    operators.cached_attention_backward_columns(
        problem.grad, problem.q, lse.to(acc), delta.to(acc), problem.keys, problem.values, *got, rows, columns, scores
    )
    attention.cached_attention_backward_columns(
        double.grad, double.q, lse, delta, double.keys, double.values, *exact, rows, columns, scores
    )
    plain = plain_backward(problem, lse.to(acc), delta.to(acc))[1:]
    for mine, theirs, best, untouched in zip(got, plain, exact, (problem.grad_keys, problem.grad_values), strict=True):
        for row, (first, last) in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
            theirs[row, :, :first], theirs[row, :, last:] = untouched[row, :, :first], untouched[row, :, last:]
            assert torch.equal(mine[row, :, :first], untouched[row, :, :first])
            assert torch.equal(mine[row, :, last:], untouched[row, :, last:])
        assert_within("accumulator", mine, theirs, best, BACKWARD)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("slots, slot", [(1, 0), (6, 2), (41, 0)])
@pytest.mark.parametrize("case", ["single", "some single", "long single"])
def test_token_backward(case, slots, slot, dtype):
    suite.test_token_backward(sized(CASES[case], 64), slots, slot, dtype)


OTHER = {
    "window": dict(window=33),
    "window of one": dict(window=1),
    "window of chunks": dict(window=400),
    "chunk": dict(chunk=50),
    "long chunk": dict(chunk=300),
    "cap": dict(softcap=0.8),
    "all": dict(window=90, chunk=128, softcap=1.5),
}
each_other = pytest.mark.parametrize("scores", OTHER.values(), ids=OTHER)


@each_other
@pytest.mark.parametrize("case", ["prefix", "one row", "few", "long single", "long few"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_scores(case, dtype, scores):
    case = replace(sized(CASES[case], 64), **scores)
    suite.check_forward(case, dtype)
    suite.check_backward(case, dtype)


@each_other
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_backward_of_other_scores(dtype, scores):
    suite.check_token_backward(replace(sized(CASES["long single"], 64), **scores), 41, 3, dtype)


@each_other
@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 256), (torch.float16, 128), (torch.float64, 40)], ids=str)
def test_other_scores_at_other_sizes(dtype, head_dim, scores):
    case = replace(sized(Case((19, 1), (340, 2)), head_dim), **scores)
    if dtype != torch.float64:
        suite.check_forward(case, dtype)
    suite.check_backward(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scores", [dict(window=30), dict(chunk=64)], ids=str)
@pytest.mark.parametrize("case", ["one row", "long single", "long rows"])
def test_nothing_out_of_sight_is_read(operators, case, scores, dtype):
    """Columns that no query sees are poison: in the forward and in both backwards."""
    case = replace(sized(CASES[case], 64), **scores)
    p = Problem(case, dtype)
    arguments = p.q, None, None, p.keys, p.values, p.rows, p.scores
    out, lse = attention.cached_attention(*(x.double() if i in (0, 3, 4) else x for i, x in enumerate(arguments)))
    out, lse = out.to(dtype), lse.to(accumulation_dtype(dtype))
    delta = (out.to(lse.dtype) * p.grad.to(lse.dtype)).sum(-1)
    for row, start in enumerate(case.starts):
        for x in (p.keys, p.values):
            x[row, :, : p.scores.first_seen(start)] = torch.nan
    first = torch.tensor([p.scores.first_seen(n) for n in case.starts], dtype=torch.int32, device=cases.DEVICE)
    grads = [torch.zeros_like(x) for x in (p.grad_keys, p.grad_values)]
    got, got_lse = operators.cached_attention(*arguments)
    grad_q, _ = operators.cached_attention_backward_queries(p.grad, p.q, out, lse, *arguments[3:])
    operators.cached_attention_backward_columns(
        p.grad, p.q, lse, delta, p.keys, p.values, *grads, p.rows, ColumnRanges(first, p.columns.end), p.scores
    )
    for x in (got, got_lse, grad_q):
        assert x[p.claimed].isfinite().all()
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize("case, head_dim", [("primes", 64), ("prefix", 20), ("some single", 64)])
def test_append_and_gather(case, head_dim, dtype):
    suite.test_append_and_gather(replace(RAGGED[case], head_dim=head_dim), dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary, dim", [(None, 32), (16, 32), (32, 32), (10, 25), (24, 24)])
@pytest.mark.parametrize(
    "source, dest", [*[(d, d) for d in SUPPORTED], (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)  # fmt: skip
def test_concat(source, dest, rotary, dim, interleaved):
    suite.check_concat(source, dest, rotary, interleaved, [[0, 2, 1], [3, 0, 7]], [[9, 0, 5], [70, 1, 0]], dim=dim)


def test_concat_of_many_senders():
    """More than the pointer table of one launch holds."""
    senders = 37
    begin, counts = [[i % 3, 0] for i in range(senders)], [[i % 5, 1] for i in range(senders)]
    suite.check_concat(torch.bfloat16, torch.bfloat16, 32, False, begin, counts, dim=32)


def test_concat_of_overlapping_segments(operators):
    """A trace that sends the same columns twice gets both gradients."""
    torch.manual_seed(0)
    shared, other = ([random(1, 2, 2, 60, 32, dtype=torch.float32) for _ in range(2)] for _ in range(2))
    grads = [random(1, 2, 2, 130, 32, dtype=torch.float32) for _ in range(2)]
    begin, counts, dest = (
        torch.tensor(x, dtype=torch.int32, device=cases.DEVICE)
        for x in ([[0, 5], [3, 3], [20, 0]], [[40, 30], [9, 50], [37, 12]], [[0, 0], [40, 30], [49, 80]])
    )
    angle = torch.randn(3, 2, 16, device=cases.DEVICE)

    def run(function, dtype):
        same, single = ([x.to(dtype, copy=True) for x in group] for group in (shared, other))
        function.kv_concat_backward(
            *(x.to(dtype) for x in grads), *([a, b, a] for a, b in zip(same, single, strict=True)),
            begin, counts, dest, angle.cos().to(dtype), angle.sin().to(dtype), False,
        )  # fmt: skip
        return [*same, *single]

    results = run(operators, torch.float32), run(concat, torch.float32), run(concat, torch.float64)
    for got, plain, exact in zip(*results, strict=True):
        assert_within("source gradient", got, plain, exact, BACKWARD)


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize(
    "rows, size, weighted", [(0, 64, True), (1, 304, True), (3, 301, True), (37, 304, True), (3, 77, False)]
)
def test_latent_project(rows, size, weighted, dtype):
    suite.test_latent_project(rows, size, weighted, dtype)


@pytest.mark.parametrize("rows", [1, 13])
def test_latent_project_in_parts(operators, rows):
    """Sums that are split, and finished by the last block: the counters are left as they were found."""
    suite.test_latent_project(rows, 584, True, torch.bfloat16)
    hidden, weight = random(rows, 584, dtype=torch.bfloat16), random(584, 584, dtype=torch.bfloat16)
    first = operators.latent_project(hidden, weight, 1.7)
    for _ in range(2):
        assert all(map(suite.same, operators.latent_project(hidden, weight, 1.7), first))


#: Rows, vocabulary, depth and width: of hardly a token, of the simple kernels' sizes, of more rows than a tile, with
#: parts of several tiles, and wider than a block's sums in the forward and in the backward.
VOCABULARIES = {
    "two tokens": (1, 2, 8, 16),
    "no rows": (0, 70, 24, 24),
    "odd sizes": (2, 513, 77, 130),
    "two tiles of rows": (17, 470, 136, 264),
    "many tokens": (3, 1300, 64, 64),
    "wide": (5, 140, 72, 2056),
    "deep": (2, 140, 2056, 72),
}


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize("sizes", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("biased, softcap", [(False, None), (True, 2.5)])
def test_expected_embedding(biased, softcap, sizes, dtype):
    suite.check_expected_embedding(*sizes, biased, softcap, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("grad_size", [3e-4, 2e3])
def test_expected_embedding_of_other_gradients(grad_size, dtype):
    """Small and large ones keep their precision; float16 alone would lose them."""
    suite.check_expected_embedding(4, 900, 64, 136, False, None, dtype, grad_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expected_embedding_without_some_tokens(operators, dtype):
    cases.check_without_some_tokens(operators, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("sets", [1, 7])
def test_merge_states(sets, dtype):
    suite.test_merge_states(sets, dtype)


def everything(operators, dtype):
    """Results of all operators of attention on one problem of several tiles, chunks and rows."""
    p = Problem(sized(Case((1, 1, 0, 1), (300, 2, 7, 131)), 64), dtype)
    out, lse = operators.cached_attention(p.q, p.k, p.v, p.keys, p.values, p.rows, p.scores)
    shape = (4, 3, p.q.shape[1])
    pending = [random(*shape, 64, dtype=dtype), random(*shape, 64, dtype=dtype)]
    pending += [random(*shape, dtype=torch.float32) + 5, random(*shape, dtype=torch.float32)]
    token = operators.cached_attention_backward_token(
        p.grad, p.q, out, lse, p.keys, p.values, p.grad_keys, p.grad_values, Pending(*pending, p.rows.starts - 1),
        p.rows, p.scores,
    )  # fmt: skip
    p = Problem(sized(Case((40, 3), (70, 150)), 64), dtype)
    many, many_lse = operators.cached_attention(p.q, None, None, p.keys, p.values, p.rows, p.scores)
    grad_q, delta = operators.cached_attention_backward_queries(
        p.grad, p.q, many, many_lse, p.keys, p.values, p.rows, p.scores
    )
    operators.cached_attention_backward_columns(
        p.grad, p.q, many_lse, delta, p.keys, p.values, p.grad_keys, p.grad_values,
        p.rows, p.columns, p.scores,
    )  # fmt: skip
    packed = [x[p.claimed] for x in (many, many_lse, grad_q, delta)]
    hidden, keys = random(3, 64, dtype=dtype), random(900, 64, dtype=dtype)
    given = (hidden, keys, keys, None, torch.ones(1, device=cases.DEVICE))
    soft = operators.expected_embedding(*given, 0.4, None)
    soft += operators.expected_embedding_backward(hidden, *given, *soft, 0.4, None)
    single = [x[1:2] for x in (out, lse, *token)]
    return [*packed, *single, *soft, p.grad_keys, p.grad_values, *(x[:, 1:] for x in pending)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bit_repeatable(operators, dtype):
    first = everything(operators, dtype)
    for _ in range(100):
        assert all(map(suite.same, everything(operators, dtype), first))


def test_graph_capture(operators):
    """A captured call reads its lengths on the device: replayed after they changed, it gives the new result."""
    case = sized(Case((1, 1), (300, 40)), 64)
    p = Problem(case, torch.bfloat16)
    starts = p.rows[2].clone()
    arguments = (p.q, None, None, p.keys, p.values, p.rows._replace(starts=starts), p.scores)
    operators.cached_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = operators.cached_attention(*arguments)
    starts -= indices(111, 7)
    graph.replay()
    want, want_lse = operators.cached_attention(*arguments)
    assert torch.equal(out[p.claimed], want[p.claimed]) and torch.equal(lse[p.claimed], want_lse[p.claimed])


def test_offsets_beyond_32_bits(operators):
    """Columns more than 2³¹ elements apart: an offset in 32 bits would wrap."""
    p = Problem(sized(Case((2,), (3,)), 64, "mqa"), torch.bfloat16)
    apart = 2**29 + 64
    far = torch.empty(4 * apart + 64, dtype=torch.bfloat16, device=cases.DEVICE)
    far = far.as_strided((1, 1, 5, 64), (1, 1, apart, 1))
    far[:, :, :3] = p.keys[:, :, :3]
    got = operators.cached_attention(p.q, p.k, p.v, far, p.values[:, :, :5], p.rows, p.scores)
    want = operators.cached_attention(p.q, p.k, p.v, p.keys, p.values, p.rows, p.scores)
    assert all(torch.equal(a[p.claimed], b[p.claimed]) for a, b in zip(got, want, strict=True))


def test_head_dim_too_large(operators):
    p = Problem(Case((2,), (3,), head_dim=320), torch.float32)
    with pytest.raises(RuntimeError, match="head dim 320; allowed on CUDA: 1 to 256"):
        operators.cached_attention(p.q, None, None, p.keys, p.values, p.rows, p.scores)


def test_senders_of_two_dtypes(operators):
    keys, values = (strided(1, 1, 1, 4, 16, dtype=torch.float32) for _ in range(2))
    table = torch.zeros(1, 1, dtype=torch.int32, device=cases.DEVICE)
    with pytest.raises(RuntimeError, match=r"source_values\[0\] is Half; allowed: Float"):
        operators.kv_concat([keys], [values.half()], keys, values, table, table, table, None, None, False)
