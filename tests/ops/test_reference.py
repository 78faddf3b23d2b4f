"""The reference operators against plain formulas and autograd, in float64."""

import importlib

import pytest
import torch
from compare import error
from oracle import attend, rotate

from diffmas_ops.rows import ColumnRanges, Pending, RowRanges
from diffmas_ops.scores import Scores

TOLERANCE = 1e-12
pytestmark = pytest.mark.usefixtures("poison")
F64 = dict(dtype=torch.float64)


def reference(operator):
    return importlib.import_module(f"diffmas_ops.{operator}.reference")


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


# Rows with no token, one token, and a prime number of them; they are not adjacent, and tokens 0, 4 and 5 are nobody's.
RANGES = RowRanges(i32(1, 4, 2, 6), i32(2, 4, 4, 13), i32(3, 5, 0, 2), 7, 11)
TOTAL, CAPACITY, HEADS, KV_HEADS, DIM = 14, 11, 6, 2, 4


each_kind = pytest.mark.parametrize(
    "kind",
    [
        *(dict(window=n) for n in (None, 1, 3, 20)), *(dict(chunk=n) for n in (1, 3, 4)),
        dict(softcap=0.4), dict(softcap=0.4, window=3, chunk=4),
    ],
    ids=str,
)  # fmt: skip


def rows():
    return list(zip(*(r.tolist() for r in RANGES[:3]), strict=True))


def cache(*shape):
    return torch.randn(4, KV_HEADS, CAPACITY, DIM, **F64) if not shape else torch.randn(*shape, **F64)


def test_append_writes_the_ends_of_rows_and_gather_reads_them_back():
    ops = reference("kv_append")
    k, v = torch.randn(2, TOTAL, KV_HEADS, DIM, **F64)
    keys, values = cache(), cache()
    before = keys.clone(), values.clone()
    ops.kv_append(k, v, keys, values, RANGES)
    untouched = torch.ones(4, CAPACITY, dtype=torch.bool)
    for row, (begin, end, start) in enumerate(rows()):
        for i in range(end - begin):
            assert torch.equal(keys[row, :, start + i], k[begin + i])
            assert torch.equal(values[row, :, start + i], v[begin + i])
            untouched[row, start + i] = False
    for new, old in zip((keys, values), before, strict=True):
        assert torch.equal(new.transpose(1, 2)[untouched], old.transpose(1, 2)[untouched])
    claimed = torch.tensor([any(b <= t < e for b, e, _ in rows()) for t in range(TOTAL)])
    for read, written in zip(ops.kv_gather(keys, values, RANGES, TOTAL, torch.float32), (k, v), strict=True):
        assert read.dtype == torch.float32
        assert torch.equal(read[claimed], written[claimed].float()) and not read[~claimed].any()


@each_kind
def test_attention_is_causal_over_the_rows_own_columns(kind):
    ops = reference("cached_attention")
    q, k, v = (torch.randn(TOTAL, h, DIM, **F64) for h in (HEADS, KV_HEADS, KV_HEADS))
    keys, values = cache(), cache()
    for row, (begin, end, start) in enumerate(rows()):  # Columns no token sees hold NaN.
        keys[row, :, start + end - begin :] = values[row, :, start + end - begin :] = torch.nan
    out, lse = ops.cached_attention(q, k, v, keys, values, RANGES, Scores(0.3, **kind))
    again, _ = ops.cached_attention(q, None, None, keys, values, RANGES, Scores(0.3, **kind))
    for row, (begin, end, start) in enumerate(rows()):
        if begin < end:
            seen = [x[row, :, : start + end - begin].transpose(0, 1) for x in (keys, values)]
            assert torch.equal(seen[0][start:], k[begin:end])
            assert error(out[begin:end], attend(q[begin:end], *seen, start, 0.3, **kind)) < TOLERANCE
            assert torch.equal(out[begin:end], again[begin:end])
            for i in range(end - begin):
                scores = torch.einsum("hgd,nhd->hgn", q[begin + i].unflatten(0, (KV_HEADS, -1)), seen[0]) * 0.3
                if (softcap := kind.get("softcap")) is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                position, chunk = start + i, kind.get("chunk") or CAPACITY
                lowest = max(position + 1 - (kind.get("window") or CAPACITY), position - position % chunk, 0)
                total = scores[..., lowest : position + 1].exp().sum(-1).log().flatten()
                assert error(lse[begin + i], total) < TOLERANCE


@each_kind
def test_backward_of_many_tokens_is_that_of_autograd(kind):
    ops = reference("cached_attention")
    q, grad_out = torch.randn(2, TOTAL, HEADS, DIM, **F64)
    keys, values = cache(), cache()
    out, lse = ops.cached_attention(q, None, None, keys, values, RANGES, Scores(0.3, **kind))
    grad_q, delta = ops.cached_attention_backward_queries(
        grad_out, q, out, lse, keys, values, RANGES, Scores(0.3, **kind)
    )
    first, last = i32(1, 0, 0, 3), i32(4, 5, 2, 7)
    before = cache(), cache()
    grad_keys, grad_values = (x.clone() for x in before)
    ops.cached_attention_backward_columns(
        grad_out,
        q,
        lse,
        delta,
        keys,
        values,
        grad_keys,
        grad_values,
        RANGES,
        ColumnRanges(first, last),
        Scores(0.3, **kind),
    )
    for row, (begin, end, start) in enumerate(rows()):
        leaves = [x.detach().requires_grad_() for x in (q[begin:end], keys[row], values[row])]
        seen = [x.transpose(0, 1)[: start + end - begin] for x in leaves[1:]]
        loss = (
            (attend(leaves[0], *seen, start, 0.3, **kind) * grad_out[begin:end]).sum() if begin < end else 0 * q.sum()
        )
        wanted = torch.autograd.grad(loss, leaves) if begin < end else [torch.zeros_like(x) for x in leaves]
        assert error(grad_q[begin:end], wanted[0]) < TOLERANCE
        inside = slice(int(first[row]), int(last[row]))
        for grad, old, want in zip((grad_keys, grad_values), before, wanted[1:], strict=True):
            expected = old[row].clone()
            expected[:, inside] += want[:, inside]
            assert error(grad[row], expected) < TOLERANCE


@each_kind
def test_backward_of_single_tokens_defers_exactly_what_it_owes(kind):
    """Three single-token calls, one row absent from the middle one: deferred and then flushed, against autograd."""
    ops = reference("cached_attention")
    batch, calls = 2, 3
    present = [[0, 1], [1], [0, 1]]
    keys, values = torch.randn(2, batch, KV_HEADS, CAPACITY, DIM, **F64)
    old = i32(4, 2)
    pending = Pending(
        *torch.zeros(2, batch, calls, HEADS, DIM, **F64), torch.full((batch, calls, HEADS), torch.inf, **F64),
        torch.zeros(batch, calls, HEADS, **F64), old,
    )  # fmt: skip
    grad_keys, grad_values = torch.zeros(2, batch, KV_HEADS, CAPACITY, DIM, **F64)
    forwards, starts = [], old.clone()
    for rows_in in present:
        q, grad_out = torch.randn(2, len(rows_in), HEADS, DIM, **F64)
        ends = i32(*(sum(r <= b for r in rows_in) for b in range(batch)))
        begins = ends - i32(*(int(b in rows_in) for b in range(batch)))
        ranges = RowRanges(begins, ends, starts.clone(), 1, CAPACITY)
        out, lse = ops.cached_attention(q, None, None, keys, values, ranges, Scores(0.3, **kind))
        forwards.append((grad_out, q, out, lse, ranges))
        starts += ends - begins
    own = []
    for grad_out, q, out, lse, ranges in reversed(forwards):
        own.append(
            ops.cached_attention_backward_token(
                grad_out, q, out, lse, keys, values, grad_keys, grad_values, pending, ranges, Scores(0.3, **kind)
            )
        )
    own.reverse()
    assert not grad_keys.any() and not grad_values.any()
    # Rows' tokens stand in their slots one after the other; the slot that row 0 never reached contributes nothing.
    assert torch.equal(pending.lse[0, 2], torch.full((HEADS,), torch.inf, **F64))
    flat = [x.flatten(0, 1) for x in (pending.grad, pending.q, pending.lse, pending.delta)]
    ops.cached_attention_backward_columns(
        *flat, keys, values, grad_keys, grad_values, RowRanges(i32(0, 3), i32(3, 6), old, calls, CAPACITY),
        ColumnRanges(i32(0, 0), old), Scores(0.3, **kind),
    )  # fmt: skip
    for row in range(batch):
        leaves = [x[row].transpose(0, 1).detach().requires_grad_() for x in (keys, values)]
        queries, loss, length = [], 0, int(old[row])
        for (grad_out, q, *_), rows_in in zip(forwards, present, strict=True):
            if row in rows_in:
                at = rows_in.index(row)
                queries.append(q[at : at + 1].detach().requires_grad_())
                length += 1
                result = attend(queries[-1], *(x[:length] for x in leaves), length - 1, 0.3, **kind)
                loss = loss + (result * grad_out[at : at + 1]).sum()
        want_k, want_v, *want_q = torch.autograd.grad(loss, leaves + queries)
        column = int(old[row])
        assert error(grad_keys[row, :, :column], want_k[:column].transpose(0, 1)) < TOLERANCE
        assert error(grad_values[row, :, :column], want_v[:column].transpose(0, 1)) < TOLERANCE
        for grads, rows_in in zip(own, present, strict=True):
            if row in rows_in:
                at = rows_in.index(row)
                for actual, wanted in zip(grads, (want_q.pop(0)[0], want_k[column], want_v[column]), strict=True):
                    assert error(actual[at], wanted) < TOLERANCE
                column += 1


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 2, 4])
def test_concat_moves_and_turns_and_its_backward_is_its_transpose(rotary_dim, interleaved):
    ops = reference("kv_concat")
    begin, counts = torch.tensor([[1, 0, 2], [0, 4, 1]]).int(), torch.tensor([[3, 0, 1], [2, 3, 0]]).int()
    sources = [torch.randn(2, 3, 3, KV_HEADS, c, DIM, **F64) for c in (5, 7)]
    dest = torch.tensor([[0, 0, 0], [3, 0, 1]]).int()
    cos = sin = inv_freq = None
    if rotary_dim:
        inv_freq = torch.rand(rotary_dim // 2, **F64)
        angles = (dest - begin).double().unsqueeze(-1) * inv_freq
        cos, sin = angles.cos(), angles.sin()
    plan = begin, counts, dest, cos, sin, interleaved
    keys, values = torch.full((2, 3, 3, KV_HEADS, 9, DIM), torch.nan, **F64)
    ops.kv_concat([s[0] for s in sources], [s[1] for s in sources], keys, values, *plan)
    written = torch.zeros(3, 9, dtype=torch.bool)
    for i, source in enumerate(sources):
        for row in range(3):
            for j in range(int(counts[i, row])):
                src, dst = int(begin[i, row]) + j, int(dest[i, row]) + j
                key = source[0][:, row, :, src]
                if rotary_dim:
                    key = rotate(key, dst - src, inv_freq, interleaved)
                assert error(keys[:, row, :, dst], key) < TOLERANCE
                assert torch.equal(values[:, row, :, dst], source[1][:, row, :, src])
                written[row, dst] = True
    for made in (keys, values):
        assert made.permute(1, 3, 0, 2, 4)[~written].isnan().all()

    # ⟨concat(x), g⟩ = ⟨x, concatᵀ(g)⟩ for the part concat reads, and accumulation on top of what was there.
    grad_keys, grad_values = torch.randn(2, *keys.shape, **F64)
    before = [torch.randn_like(s) for s in sources]
    grads = [b.clone() for b in before]
    ops.kv_concat_backward(grad_keys, grad_values, [g[0] for g in grads], [g[1] for g in grads], *plan)
    inner = (keys * grad_keys).nan_to_num().sum() + (values * grad_values).nan_to_num().sum()
    outer = sum(((g - b) * s).sum() for g, b, s in zip(grads, before, sources, strict=True))
    assert error(outer, inner) < TOLERANCE
    for i, (grad, old) in enumerate(zip(grads, before, strict=True)):
        for row in range(3):
            taken = slice(int(begin[i, row]), int(begin[i, row] + counts[i, row]))
            outside = torch.ones(grad.shape[4], dtype=torch.bool)
            outside[taken] = False
            assert torch.equal(grad[:, :, row][..., outside, :], old[:, :, row][..., outside, :])


@pytest.mark.parametrize("weighted", [False, True])
def test_latent_projection_has_the_norm_and_autograds_gradient(weighted):
    ops = reference("latent_project")
    hidden, grad_out = torch.randn(2, 5, 6, **F64)
    weight = torch.randn(6, 6, **F64) if weighted else None
    out, norm = ops.latent_project(hidden, weight, 1.7)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight) if x is not None]
    y = leaves[0] @ leaves[1] if weighted else leaves[0]
    expected = 1.7 * y / y.norm(dim=1, keepdim=True)
    assert error(out, expected) < TOLERANCE and error(norm, y.norm(dim=1)) < TOLERANCE
    grads = ops.latent_project_backward(grad_out, hidden, weight, out, norm, 1.7, weighted)
    wanted = torch.autograd.grad((expected * grad_out).sum(), leaves)
    for actual, want in zip(grads, wanted, strict=False):
        assert error(actual, want) < TOLERANCE
    assert ops.latent_project_backward(grad_out, hidden, weight, out, norm, 1.7, False)[1].shape == (0,)


def test_a_zero_hidden_state_projects_to_zero_without_a_gradient():
    ops = reference("latent_project")
    hidden = torch.zeros(2, 3, **F64)
    out, norm = ops.latent_project(hidden, None, 2.0)
    grad, _ = ops.latent_project_backward(torch.ones(2, 3, **F64), hidden, None, out, norm, 2.0, False)
    assert not out.any() and not grad.any()


@pytest.mark.parametrize("vocab", [1, 7, 29])
@pytest.mark.parametrize("biased, softcap", [(False, None), (True, None), (True, 1.3)])
def test_expected_embedding_is_that_of_a_whole_softmax(vocab, biased, softcap, monkeypatch):
    ops = reference("expected_embedding")
    # Blocks that do not divide the vocabulary, and large logits in one of them.
    monkeypatch.setattr(ops, "BLOCK", 4)
    hidden, keys, values = torch.randn(3, 6, **F64), torch.randn(vocab, 6, **F64), torch.randn(vocab, 5, **F64)
    keys[vocab // 2] *= 40
    bias = torch.randn(vocab, **F64) if biased else None
    given = (hidden, keys, values, bias, torch.tensor([0.7], **F64))
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in given]
    logits = leaves[0] @ leaves[1].T
    logits = 0.8 * (logits if bias is None else logits + leaves[3])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = (logits / leaves[4]).softmax(-1) @ leaves[2]
    out, lse = ops.expected_embedding(*given, 0.8, softcap)
    assert error(out, expected) < TOLERANCE and error(lse, (logits / 0.7).logsumexp(-1)) < TOLERANCE
    grad_out = torch.randn(3, 5, **F64)
    wanted = torch.autograd.grad(expected, [x for x in leaves if x is not None], grad_out)
    arguments = (grad_out, *given, out, lse, 0.8, softcap)
    (hidden, temperature), weights = (
        f(*arguments) for f in (ops.expected_embedding_backward, ops.expected_embedding_backward_weights)
    )
    assert (weights[2] is None) == (bias is None)
    for actual, want in zip((hidden, *(x for x in weights if x is not None), temperature), wanted, strict=True):
        assert error(actual, want, 1.0) < TOLERANCE


def test_merged_parts_are_the_whole():
    merge = reference("merge_states").merge_states
    q, k, v = (torch.randn(5, 2, 4, **F64), *torch.randn(2, 9, 2, 4, **F64))
    scores = torch.einsum("qhd,khd->qhk", q, k)
    parts = [(0, 3), (3, 4), (4, 9)]
    outs = torch.stack([torch.einsum("qhk,khd->qhd", scores[..., a:b].softmax(-1), v[a:b]) for a, b in parts])
    lses = torch.stack([scores[..., a:b].logsumexp(-1) for a, b in parts])
    empty = torch.full((1, *outs.shape[1:]), torch.nan, **F64), torch.full((1, 5, 2), -torch.inf, **F64)
    out, lse = merge(torch.cat((outs, empty[0])), torch.cat((lses, empty[1])))
    assert error(out, torch.einsum("qhk,khd->qhd", scores.softmax(-1), v)) < TOLERANCE
    assert error(lse, scores.logsumexp(-1)) < TOLERANCE
    out, lse = merge(*empty)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_accumulates_in_float32(dtype):
    """Only the rounding of the inputs and of the output is left of the precision of `dtype`."""
    ops = reference("cached_attention")
    q, k, v = (torch.randn(TOTAL, h, DIM).to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
    keys, values = cache().to(dtype), cache().to(dtype)
    wide = [x.double() for x in (q, k, v, keys, values)]
    out, lse = ops.cached_attention(q, k, v, keys, values, RANGES, Scores(0.3))
    exact, exact_lse = ops.cached_attention(*wide, RANGES, Scores(0.3))
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert error(out, exact) <= torch.finfo(dtype).eps and error(lse, exact_lse) <= 1e-6
