"""The compiled CPU operators against the references.

Both run on the same inputs; errors are measured against the reference in float64, and the compiled operator may err
at most twice (gradients: three times) as much as the reference, plain PyTorch, does in the same dtype.
"""

import os
import subprocess
import sys

import pytest
import torch
from cases import check_without_some_tokens

from diffmas_ops import library
from diffmas_ops import native as native_module
from diffmas_ops.cached_attention import reference as attention
from diffmas_ops.dtypes import SUPPORTED, accumulation_dtype
from diffmas_ops.expected_embedding import reference as expected
from diffmas_ops.kv_append import reference as append
from diffmas_ops.kv_concat import reference as concat
from diffmas_ops.latent_project import reference as latent
from diffmas_ops.merge_states import reference as merge
from diffmas_ops.rows import ColumnRanges, Pending, RowRanges
from diffmas_ops.scores import Scores

pytestmark = pytest.mark.skipif(library.failure("cpu") is not None, reason=str(library.failure("cpu")))
native = native_module.CPU.functions("cached_attention")

FORWARD, BACKWARD = 2.0, 3.0


def indices(*values):
    return torch.tensor(values, dtype=torch.int32)


def poisoned(*shape, dtype, span=None):
    """A view of a larger NaN buffer: strides are not those of a contiguous tensor, and what lies between is poison."""
    wide = [n + 1 for n in shape[:-1]] + [span or shape[-1] + 3]
    return torch.full(wide, torch.nan, dtype=dtype)[tuple(slice(0, n) for n in shape)]


def random(*shape, dtype):
    view = poisoned(*shape, dtype=dtype)
    view.copy_(torch.randn(shape, dtype=torch.float64))
    return view


def mapped(function, arguments):
    made = map(function, arguments)
    return type(arguments)(*made) if hasattr(arguments, "_fields") else type(arguments)(made)


def doubled(arguments):
    """The arguments with every floating-point tensor a float64 copy."""
    if isinstance(arguments, torch.Tensor):
        return arguments.double() if arguments.is_floating_point() else arguments
    if isinstance(arguments, list | tuple):
        return mapped(doubled, arguments)
    return torch.float64 if isinstance(arguments, torch.dtype) else arguments


def copied(arguments):
    if isinstance(arguments, torch.Tensor):
        return torch.empty_strided(arguments.shape, arguments.stride(), dtype=arguments.dtype).copy_(arguments)
    return mapped(copied, arguments) if isinstance(arguments, list | tuple) else arguments


def rounding(dtype):
    """What a result may err in any case: its own rounding. In float64 plain PyTorch is itself the measure."""
    return 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps


def assert_close(name, got, plain, exact, factor):
    """`got` errs at most `factor` times as much as `plain`, up to the rounding of the result."""
    assert got.dtype == plain.dtype and got.shape == plain.shape, name
    dtype, got, plain, exact = got.dtype, got.double(), plain.double(), exact.double()
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(got), finite), f"{name}: other values are finite"
    assert torch.equal(got[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0)), name
    error, plain_error = ((x - exact)[finite].norm() for x in (got, plain))
    assert error <= factor * plain_error + rounding(dtype) * exact[finite].norm(), (
        f"{name}: error {error:.3e}, plain PyTorch's {plain_error:.3e}"
    )


def compare(function, reference, arguments, factor, results=()):
    """Run on copies; compare the outputs and the arguments at the positions `results`, which are written in place."""
    runs = []
    for run, converted in ((function, arguments), (reference, arguments), (reference, doubled(arguments))):
        given = copied(converted)
        returned = run(*given)
        returned = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
        written = [x for at in results for x in (given[at] if isinstance(given[at], list) else [given[at]])]
        runs.append([*returned, *written])
    for i, (got, plain, exact) in enumerate(zip(*runs, strict=True)):
        assert_close(f"{function} result {i}", got, plain, exact, factor)
    return runs[0]


# (new tokens, positions of their first) of every row: empty rows, single tokens, primes, no prefix, long prefixes.
RAGGED = {
    "single": ([1, 1, 1], [0, 6, 1030]),
    "some single": ([1, 0, 1, 0], [70, 3, 0, 5]),
    "few": ([2, 5, 1, 0, 3], [0, 7, 601, 4, 129]),
    "primes": ([13, 0, 1, 67, 31], [0, 5, 97, 11, 0]),
    "blocks": ([64, 128, 130], [0, 64, 63]),
    "long prefix": ([19], [2063]),
    "several tasks": ([70, 9, 33], [2000, 1023, 5]),
    "one row": ([151], [0]),
    "empty": ([0, 0], [0, 3]),
}
HEADS = {"mha": (2, 2), "gqa": (6, 2), "mqa": (12, 1), "wide": (20, 1)}


def ranges(case, gap=2):
    """q_begin, q_end, starts of a case, with unclaimed tokens between the rows, and the number of packed tokens."""
    new, starts = RAGGED[case]
    begin, at = [], 1
    for n in new:
        begin.append(at)
        at += n + gap
    return indices(*begin), indices(*[b + n for b, n in zip(begin, new, strict=True)]), indices(*starts), at


def problem(case, heads, dim, dtype, **scores):
    """Queries, new keys and values, and a trace whose columns are random up to each row's end and poison beyond."""
    torch.manual_seed(0)
    q_begin, q_end, starts, total = ranges(case)
    ends = (starts + q_end - q_begin).tolist()
    hq, hkv = HEADS[heads]
    q, k, v = (torch.full((total, h, dim), torch.nan, dtype=dtype) for h in (hq, hkv, hkv))
    keys, values = (poisoned(len(ends), hkv, max(ends) + 5, dim, dtype=dtype) for _ in range(2))
    for row, (begin, end) in enumerate(zip(q_begin.tolist(), q_end.tolist(), strict=True)):
        for x in (q, k, v):
            x[begin:end] = torch.randn(end - begin, *x.shape[1:])
        for x in (keys, values):
            x[row, :, : ends[row]] = torch.randn(hkv, ends[row], dim)
    rows = RowRanges(q_begin, q_end, starts, int((q_end - q_begin).max()), max(ends))
    return q, k, v, keys, values, rows, Scores(dim**-0.5, **scores)


def claimed(plan, total):
    mask = torch.zeros(total, dtype=torch.bool)
    for begin, end in zip(plan[0].tolist(), plan[1].tolist(), strict=True):
        mask[begin:end] = True
    return mask


def all_columns(plan):
    return ColumnRanges(torch.zeros_like(plan.starts), plan.starts + plan.q_end - plan.q_begin)


def attend(function, *arguments):
    """Only the tokens that a row claims: the others are unspecified."""
    mask = claimed(arguments[5], arguments[0].shape[0])
    return tuple(x[mask] for x in function(*arguments))


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", RAGGED)
def test_attention_forward(case, heads, dtype):
    q, k, v, keys, values, plan, scores = problem(case, heads, 64, dtype)
    arguments = (q, k, v, keys, values, plan, scores)
    compare(
        lambda *a: attend(native.cached_attention, *a), lambda *a: attend(attention.cached_attention, *a),
        arguments, FORWARD, results=(3, 4),
    )  # fmt: skip


@pytest.mark.parametrize("dim", [1, 8, 40, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("case", ["single", "few", "primes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_head_dims(dim, case, dtype):
    q, _, _, keys, values, plan, scores = problem(case, "gqa", dim, dtype)
    arguments = (q, None, None, keys, values, plan, scores)
    compare(
        lambda *a: attend(native.cached_attention, *a), lambda *a: attend(attention.cached_attention, *a),
        arguments, FORWARD,
    )  # fmt: skip
    backward(q, keys, values, plan, scores, all_columns(plan))


def backward(q, keys, values, plan, scores, columns):
    acc = accumulation_dtype(q.dtype)
    mask = claimed(plan, q.shape[0])
    out, lse = attention.cached_attention(q, None, None, keys, values, plan, scores)
    grad_out = torch.where(mask[:, None, None], torch.randn(q.shape), torch.nan).to(q.dtype)
    arguments = (grad_out, q, out, lse, keys, values, plan, scores)

    def queries(function):
        return lambda *a: tuple(x[mask] for x in function(*a))

    native_queries = queries(native.cached_attention_backward_queries)
    compare(native_queries, queries(attention.cached_attention_backward_queries), arguments, BACKWARD)
    delta = (out.to(acc) * grad_out.to(acc)).sum(-1)
    grad_keys, grad_values = (torch.randn(x.shape, dtype=acc) for x in (keys, values))
    arguments = (
        grad_out, q, lse, delta, keys, values, grad_keys, grad_values, plan, columns, scores
    )  # fmt: skip
    compare(
        native.cached_attention_backward_columns, attention.cached_attention_backward_columns,
        arguments, BACKWARD, results=(6, 7),
    )  # fmt: skip

    arguments = (
        grad_out, q, out, lse, keys, values, grad_keys, grad_values, plan, columns, scores
    )  # fmt: skip
    compare(
        lambda *a: native.cached_attention_backward(*a)[mask],
        lambda *a: attention.cached_attention_backward(*a)[mask],
        # The sums of a query are rounded once every vector of columns, which shows where there are few queries.
        arguments, 1.5 * BACKWARD, results=(6, 7),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", RAGGED)
def test_attention_backward(case, heads, dtype):
    q, _, _, keys, values, plan, scores = problem(case, heads, 64, dtype)
    backward(q, keys, values, plan, scores, all_columns(plan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "scores",
    [
        *(dict(window=n) for n in (1, 7, 64, 600, 3000)),
        *(dict(chunk=n) for n in (1, 50, 128, 1000)),
        dict(chunk=90, window=20),
        dict(chunk=90, window=130),
        dict(softcap=0.7),
        dict(softcap=50.0),
        dict(softcap=1.5, window=40, chunk=64),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case, heads", [("single", "wide"), ("few", "gqa"), ("primes", "wide"), ("blocks", "gqa"), ("several tasks", "gqa")]
)
def test_other_scores(case, heads, scores, dtype):
    q, _, _, keys, values, plan, scores = problem(case, heads, 64, dtype, **scores)
    arguments = (q, None, None, keys, values, plan, scores)
    compare(
        lambda *a: attend(native.cached_attention, *a), lambda *a: attend(attention.cached_attention, *a),
        arguments, FORWARD,
    )  # fmt: skip
    backward(q, keys, values, plan, scores, all_columns(plan))


@pytest.mark.parametrize("case", ["few", "primes", "blocks"])
def test_columns_between(case):
    """A window of columns that ends before the newest one: nothing outside it is read or written."""
    q, _, _, keys, values, plan, scores = problem(case, "gqa", 64, torch.float32)
    first, last = plan[2] // 3, plan[2] + (plan[1] - plan[0]) // 2
    for x in (keys, values):
        original = x.clone()
        x.fill_(torch.nan)
        for row, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            x[row, :, a:b] = original[row, :, a:b]
    mask = claimed(plan, q.shape[0])
    grad_out = torch.where(mask[:, None, None], torch.randn(q.shape), torch.nan)
    lse, delta = (torch.randn(q.shape[:2]) + 3 for _ in range(2))
    grads = [torch.randn(x.shape) for x in (keys, values)]
    arguments = (grad_out, q, lse, delta, keys, values, *grads, plan, ColumnRanges(first, last), scores)
    compare(
        native.cached_attention_backward_columns, attention.cached_attention_backward_columns,
        arguments, BACKWARD, results=(6, 7),
    )  # fmt: skip


@pytest.mark.parametrize("dim", [40, 64])
def test_all_gradients_of_long_rows(dim):
    """Rows whose columns are cut into several tasks, columns without gradient before, between tasks and behind."""
    q, _, _, keys, values, plan, scores = problem("several tasks", "gqa", dim, torch.float32)
    last = plan[2] + plan[1] - plan[0]
    backward(q, keys, values, plan, scores, ColumnRanges(indices(515, 1024, 0), last - indices(3, 0, 7)))


@pytest.mark.parametrize(
    "scores", [{}, dict(window=20), dict(window=170), dict(chunk=100), dict(chunk=60, softcap=0.7)], ids=str
)
@pytest.mark.parametrize("slots, first", [(1, 0), (7, 2), (43, 0)])
@pytest.mark.parametrize("heads", HEADS)
def test_deferred_rows(slots, first, heads, scores):
    """A flush: pending rows behind every column, with holes, and unused slots before the first."""
    hq, hkv = HEADS[heads]
    batch, dim, columns = 3, 64, 150
    q, grad_out = (random(batch, slots, hq, dim, dtype=torch.float32) for _ in range(2))
    lse, delta = torch.randn(batch, slots, hq) + 5, torch.randn(batch, slots, hq)
    for x in (q, grad_out, lse, delta):
        x[:, :first] = torch.nan
    q[1, -1], grad_out[1, -1], lse[1, -1], delta[1, -1] = 0, 0, torch.inf, 0
    keys, values = (random(batch, hkv, columns, dim, dtype=torch.float32) for _ in range(2))
    grads = [torch.randn(x.shape) for x in (keys, values)]
    q_begin = torch.arange(batch, dtype=torch.int32) * slots + first
    q_end = torch.arange(1, batch + 1, dtype=torch.int32) * slots
    plan = RowRanges(q_begin, q_end, torch.full_like(q_begin, columns + first), slots, columns)
    arguments = (
        grad_out.reshape(-1, hq, dim), q.reshape(-1, hq, dim), lse.flatten(0, 1), delta.flatten(0, 1), keys, values,
        *grads, plan, ColumnRanges(indices(0, 3, 0), indices(columns, 140, 0)), Scores(dim**-0.5, **scores),
    )  # fmt: skip
    compare(
        native.cached_attention_backward_columns, attention.cached_attention_backward_columns,
        arguments, BACKWARD, results=(6, 7),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize(
    "slots, slot, scores",
    [
        (1, 0, {}), (6, 2, {}), (70, 0, {}), (5, 4, {}), (70, 3, dict(window=9)), (70, 3, dict(chunk=40)),
        (41, 5, dict(softcap=0.9)), (41, 5, dict(softcap=0.9, chunk=40, window=9)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("case, heads", [("single", "gqa"), ("some single", "mha"), ("single", "wide")])
def test_token_backward(case, heads, slots, slot, scores, dtype):
    q, _, _, keys, values, plan, scores = problem(case, heads, 64, dtype, **scores)
    acc, (batch, hq) = accumulation_dtype(dtype), (keys.shape[0], q.shape[1])
    mask = claimed(plan, q.shape[0])
    out, lse = attention.cached_attention(q, None, None, keys, values, plan, scores)
    grad_out = torch.where(mask[:, None, None], torch.randn(q.shape), torch.nan).to(dtype)
    grads = [torch.full(x.shape, torch.nan, dtype=acc) for x in (keys, values)]
    for row, column in enumerate(plan.starts.tolist()):
        for x in grads:
            x[row, :, column] = torch.randn(x.shape[1], x.shape[3], dtype=acc)
    # The last row was absent from an earlier call, where there was one.
    own = torch.full((batch,), slot, dtype=torch.int32)
    own[-1] = max(slot - 1, 0)
    pending = [random(batch, slots, hq, 64, dtype=dtype) for _ in range(2)]
    pending += [torch.randn(batch, slots, hq, dtype=acc) + 5 * (i == 0) for i in range(2)]
    for row, at in enumerate(own.tolist()):
        for x in pending:
            x[row, : at + 1] = torch.nan
    deferred = Pending(*pending, plan.starts - own)
    arguments = (grad_out, q, out, lse, keys, values, *grads, deferred, plan, scores)

    def written(function):
        def run(*a):
            returned = tuple(x[mask] for x in function(*a))
            return returned + tuple(x[:, slot:] for x in a[8][:4])

        return run

    compare(
        written(native.cached_attention_backward_token), written(attention.cached_attention_backward_token),
        arguments, BACKWARD,
    )  # fmt: skip


def test_unclaimed_tokens_are_zero():
    q, _, _, keys, values, plan, scores = problem("primes", "gqa", 64, torch.float32)
    rest = ~claimed(plan, q.shape[0])
    for x in native.cached_attention(q, None, None, keys, values, plan, scores):
        assert not x[rest].any()


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize("case", RAGGED)
def test_append_and_gather(case, dtype):
    _, k, v, keys, values, plan, _ = problem(case, "gqa", 40, dtype)
    arguments = (k.transpose(0, 1).contiguous().transpose(0, 1), v, keys, values, plan)
    mine, theirs = copied(arguments), copied(arguments)
    native.kv_append(*mine)
    append.kv_append(*theirs)
    for i in (2, 3):
        assert torch.equal(mine[i].nan_to_num(7.0), theirs[i].nan_to_num(7.0))
    acc = accumulation_dtype(dtype)
    grads = [x.to(acc) for x in mine[2:4]]
    arguments = (*grads, plan, k.shape[0], dtype)
    for got, want in zip(native.kv_gather(*arguments), append.kv_gather(*arguments), strict=True):
        assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [None, 16, 24, 40])
@pytest.mark.parametrize(
    "source, dest", [*[(d, d) for d in SUPPORTED], (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)  # fmt: skip
def test_concat(rotary, interleaved, source, dest):
    torch.manual_seed(0)
    layers, batch, heads, dim, acc = 2, 3, 2, 40, accumulation_dtype(source)
    sources = [[random(layers, batch, heads, c, dim, dtype=source) for c in (9, 150)] for _ in range(2)]
    keys, values = (poisoned(layers, batch, heads, 160, dim, dtype=dest) for _ in range(2))
    begin, counts = torch.tensor([[0, 2, 1], [3, 0, 7]]), torch.tensor([[9, 0, 5], [140, 1, 0]])
    plan = [x.int() for x in (begin, counts, torch.stack((torch.zeros(3), counts[0] + 1)))]
    angles = [None, None]
    if rotary:
        angle = torch.randn(2, batch, rotary // 2, dtype=torch.float64)
        angles = [angle.cos().to(acc), angle.sin().to(acc)]
    compare(
        native.kv_concat, concat.kv_concat, (*sources, keys, values, *plan, *angles, interleaved), FORWARD,
        results=(2, 3),
    )  # fmt: skip
    grads = [random(*keys.shape, dtype=acc) for _ in range(2)]
    source_grads = [[random(*x.shape, dtype=acc) for x in group] for group in sources]
    compare(
        native.kv_concat_backward, concat.kv_concat_backward, (*grads, *source_grads, *plan, *angles, interleaved),
        BACKWARD, results=(2, 3),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 37])
@pytest.mark.parametrize("size, weighted", [(64, True), (301, True), (77, False)])
def test_latent_project(rows, size, weighted, dtype):
    torch.manual_seed(0)
    hidden, grad_out = (random(rows, size, dtype=dtype) for _ in range(2))
    weight = random(size, size, dtype=dtype) if weighted else None
    if rows == 3:
        hidden[1] = 0
    compare(native.latent_project, latent.latent_project, (hidden, weight, 1.7), FORWARD)
    out, norm = latent.latent_project(hidden, weight, 1.7)
    for need_weight in (False, True):
        arguments = (grad_out, hidden, weight, out, norm, 1.7, need_weight)
        compare(native.latent_project_backward, latent.latent_project_backward, arguments, BACKWARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operators", [native, expected], ids=["native", "reference"])
def test_expected_embedding_without_some_tokens(operators, dtype):
    # More than the reference looks at together.
    check_without_some_tokens(operators, dtype, vocab=5000)


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 37])
@pytest.mark.parametrize("vocab, depth, width", [(5, 16, 16), (63, 48, 48), (2300, 77, 40)])
@pytest.mark.parametrize("biased, softcap", [(False, None), (True, 2.5)])
def test_expected_embedding(vocab, depth, width, rows, biased, softcap, dtype):
    torch.manual_seed(0)
    hidden, keys, values = (random(*shape, dtype=dtype) for shape in ((rows, depth), (vocab, depth), (vocab, width)))
    bias, grad_out = torch.randn(vocab).to(dtype) if biased else None, random(rows, width, dtype=dtype)
    # One token that is far likelier than others, in the middle of a block.
    keys[vocab // 3] *= 3
    temperature = torch.tensor([0.7], dtype=accumulation_dtype(dtype))
    given = (hidden, keys, values, bias, temperature)

    def beside_its_products(forward):
        """A logit is a sum that may cancel: the logarithm of their sum is measured beside what they are sums of."""

        def run(hidden, keys, *rest):
            out, lse = forward(hidden, keys, *rest)
            products = hidden.abs().to(lse.dtype) @ keys.abs().to(lse.dtype).T
            return out, torch.cat((lse, products.amax(1)))

        return run

    functions = (native.expected_embedding, expected.expected_embedding)
    compare(*map(beside_its_products, functions), (*given, 0.4, softcap), FORWARD)
    out, lse = expected.expected_embedding(*given, 0.4, softcap)

    def beside_its_terms(backward):
        """The gradient of the temperature is a sum that may cancel: it is measured beside what it is a sum of."""

        def run(grad_out, *rest):
            (hidden, temperature), (out, lse) = backward(grad_out, *rest), rest[5:7]
            terms = ((grad_out * out).abs().sum(1) * lse.abs()).sum()
            return hidden, torch.cat((temperature, terms[None].to(temperature.dtype)))

        return run

    arguments = (grad_out, *given, out, lse, 0.4, softcap)
    functions = (native.expected_embedding_backward, expected.expected_embedding_backward)
    compare(*map(beside_its_terms, functions), arguments, BACKWARD)


@pytest.mark.parametrize("dtype", SUPPORTED, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_merge_states(splits, dtype):
    torch.manual_seed(0)
    outs = random(splits, 5, 3, 40, dtype=dtype)
    lses = torch.randn(splits, 5, 3, dtype=accumulation_dtype(dtype)) * 4
    lses[0, 0] = lses[:, 1] = -torch.inf
    outs[lses == -torch.inf] = torch.nan
    compare(native.merge_states, merge.merge_states, (outs, lses), FORWARD)


def _everything():
    """One pass through every attention operator, as bytes."""
    q, k, v, keys, values, plan, scores = problem("primes", "gqa", 64, torch.float32)
    out, lse = native.cached_attention(q, k, v, keys, values, plan, scores)
    grad_q, delta = native.cached_attention_backward_queries(out, q, out, lse, keys, values, plan, scores)
    grads = [torch.zeros(x.shape) for x in (keys, values)]
    ends = plan[2] + plan[1] - plan[0]
    native.cached_attention_backward_columns(
        out, q, lse, delta, keys, values, *grads, plan, ColumnRanges(torch.zeros_like(ends), ends), scores
    )
    q, _, _, keys, values, plan, scores = problem("single", "gqa", 64, torch.float32)
    single = native.cached_attention(q, None, None, keys, values, plan, scores)
    hidden, vocabulary = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), keys.reshape(-1, 64)
    given = (hidden, vocabulary, vocabulary, None, torch.ones(1))
    soft = native.expected_embedding(*given, 1.0, None)
    soft += native.expected_embedding_backward(hidden, *given, *soft, 1.0, None)
    return [x.numpy().tobytes() for x in (out, lse, grad_q, delta, *grads, *single, *soft)]


def test_bit_repeatable():
    first = _everything()
    for _ in range(100):
        assert _everything() == first


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_number_of_threads(threads):
    before, first = torch.get_num_threads(), _everything()
    try:
        torch.set_num_threads(threads)
        assert _everything() == first
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    """This file again, in a process that is held to a lesser instruction set than the machine's."""
    if os.environ.get("DIFFMAS_ISA"):
        pytest.skip("already in such a process")
    attention = "head_dims or (deferred and gqa) or (attention and gqa and (primes or single))"
    selection = f"({attention} or (latent and 37) or expected or merge) and not float16 and not float64"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", selection]
    done = subprocess.run(command, env={**os.environ, "DIFFMAS_ISA": isa}, capture_output=True, text=True)
    if "allowed on this machine" in done.stdout:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stdout[-4000:]


def _bad(**changes):
    q, k, v, keys, values, rows, scores = problem("few", "gqa", 64, torch.float32)
    arguments = dict(q=q, k=k, v=v, keys=keys, values=values, **rows._asdict(), **scores._asdict())
    changed = {name: change(arguments) for name, change in changes.items()}
    return torch.ops.diffmas.cached_attention(**arguments | changed)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": lambda a: a["q"][:, :5]}, "q has 5 heads; allowed: a multiple of the 2 heads of keys"),
        ({"q": lambda a: a["q"].double()}, "q is Double; allowed: Float"),
        ({"k": lambda a: None}, "k is None, v is not; allowed: both or neither"),
        ({"v": lambda a: a["v"][1:]}, r"v has shape \[\d+, 2, 64\]; allowed: \[\d+, 2, 64\]"),
        ({"keys": lambda a: a["keys"].mT}, "keys has stride"),
        ({"values": lambda a: a["values"][:1]}, r"values has shape \[1, "),
        ({"starts": lambda a: a["starts"].long()}, "starts is Long; allowed: Int"),
        ({"starts": lambda a: a["starts"] + 99}, r"starts\[2\] is 700; allowed: 0 to "),
        ({"starts": lambda a: a["starts"] - 1}, r"starts\[0\] is -1; allowed: 0 and above"),
        ({"q_end": lambda a: a["q_end"] + 1000}, r"q_end\[0\] are 1, 1003; allowed: 0 <= q_begin <= q_end <= "),
        ({"q_begin": lambda a: a["q_begin"][1:]}, r"q_begin has shape \[4\]; allowed: \[5\]"),
        ({"max_seqlen_q": lambda a: 4}, "max_seqlen_q is 4; allowed: at least the 5 tokens of row 1"),
        ({"max_seqlen_k": lambda a: 10**6}, "max_seqlen_k is 1000000; allowed: 0 to "),
        ({"window": lambda a: 0}, "window is 0; allowed: 1 and above, or None"),
        ({"chunk": lambda a: -3}, "chunk is -3; allowed: 1 and above, or None"),
        ({"softcap": lambda a: 0.0}, "softcap is 0; allowed: above 0 and finite, or None"),
        ({"softcap": lambda a: float("inf")}, "softcap is inf; allowed: above 0 and finite, or None"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(RuntimeError, match=message):
        _bad(**changes)
