"""Ragged inputs for the GPU-style operators, what plain PyTorch makes of them, and the error that allows.

Everything is made in float64 and rounded to the dtype under test, so that all dtypes see the same problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from diffmas_ops.dtypes import accumulation_dtype
from diffmas_ops.rows import ColumnRanges, RowRanges
from diffmas_ops.scores import Scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Triton's interpreter multiplies bfloat16 wrongly.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())

FORWARD, BACKWARD = 2.0, 3.0


@dataclass(frozen=True)
class Case:
    """New tokens and trace columns before them, per row; query heads, key/value heads and head dim."""

    new: tuple[int, ...]
    starts: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    scale: float = 0.3
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None

    @property
    def max_seqlen_q(self) -> int:
        return max(self.new)

    @property
    def max_seqlen_k(self) -> int:
        return max(n + s for n, s in zip(self.new, self.starts, strict=True))


RAGGED = {
    "prefix": Case((5, 0, 37), (3, 7, 50)),
    "primes": Case((13, 1, 41), (0, 97, 11), heads=3, kv_heads=1, head_dim=24),
    "no prefix": Case((64, 33), (0, 0), heads=2, kv_heads=2),
    "one row": Case((67,), (129,), heads=5, kv_heads=1),
    "few": Case((2, 3, 0), (131, 0, 9)),
    "single": Case((1, 1), (0, 200), heads=8, kv_heads=2),
    "some single": Case((0, 1, 1), (5, 161, 64), heads=5, kv_heads=1, head_dim=40),
    "one token of one": Case((1,), (0,), heads=1, kv_heads=1),
}
WINDOWED = {
    "shorter than the new tokens": Case((5, 0, 37), (3, 7, 50), window=4),
    "one column": Case((13, 1, 41), (0, 97, 11), heads=3, kv_heads=1, head_dim=24, window=1),
    "across tiles": Case((64, 33), (0, 90), heads=2, kv_heads=2, window=33),
    "longer than some rows": Case((67, 9), (129, 0), heads=5, kv_heads=1, window=100),
    "longer than all": Case((2, 3, 0), (131, 0, 9), window=1000),
    "single": Case((1, 0, 1), (0, 7, 200), heads=8, kv_heads=2, window=50),
}
CHUNKED = {
    "shorter than the new tokens": Case((5, 0, 37), (3, 7, 50), chunk=4),
    "one column": Case((13, 1, 41), (0, 97, 11), heads=3, kv_heads=1, head_dim=24, chunk=1),
    "across tiles": Case((64, 33), (0, 90), heads=2, kv_heads=2, chunk=50),
    "longer than all": Case((2, 3, 0), (131, 0, 9), chunk=1000),
    "single": Case((1, 1, 1), (0, 96, 200), heads=8, kv_heads=2, chunk=96),
    "with a shorter window": Case((30, 9), (129, 0), heads=5, kv_heads=1, chunk=40, window=11),
    "with a longer window": Case((30, 9), (129, 0), heads=5, kv_heads=1, chunk=20, window=31),
}
CAPPED = {
    "all columns": Case((5, 0, 37), (3, 7, 50), softcap=0.8),
    "cap that scores hardly feel": Case((13, 1, 41), (0, 97, 11), heads=3, kv_heads=1, head_dim=24, softcap=50.0),
    "single": Case((1, 1, 1), (0, 96, 200), heads=8, kv_heads=2, softcap=1.5),
    "with window and chunk": Case((30, 9), (129, 0), heads=5, kv_heads=1, chunk=40, window=31, softcap=0.5),
}
KINDS = {"window": WINDOWED, "chunk": CHUNKED, "cap": CAPPED}
SINGLE = {name: case for name, case in RAGGED.items() if case.max_seqlen_q == 1}


@st.composite
def cases(draw, max_new: int = 40) -> Case:
    rows = draw(st.integers(1, 3))
    new = draw(st.lists(st.integers(0, max_new), min_size=rows, max_size=rows).filter(any))
    starts = draw(st.lists(st.integers(0, 90), min_size=rows, max_size=rows))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (1, 5)]))
    return Case(tuple(new), tuple(starts), kv_heads * group, kv_heads, draw(st.sampled_from([16, 20, 32])))


def indices(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def strided(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """All NaN, and a view of a larger NaN buffer: only the last dimension has the stride of a contiguous tensor."""
    wide = torch.full([n + 1 for n in shape[:-1]] + [shape[-1] + 8], torch.nan, dtype=dtype, device=DEVICE)
    return wide[tuple(slice(n) for n in shape)]


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    view = strided(*shape, dtype=dtype)
    view.copy_(torch.randn(shape, dtype=torch.float64))
    return view


class Problem:
    """Packed queries, keys, values and output gradients of a case over a trace that is NaN where nothing was written.

    There are unclaimed NaN tokens between the rows; `claimed` is the mask of the tokens that belong to a row. `scores`
    are the operators', `columns` all of them.
    """

    def __init__(self, case: Case, dtype: torch.dtype, seed: int = 0):
        torch.manual_seed(seed)
        self.case, self.dtype, batch = case, dtype, len(case.new)
        begins = [1 + sum(case.new[:row]) + row for row in range(batch)]
        total = 2 + sum(case.new) + batch
        self.q, self.grad = (strided(case.heads, total, case.head_dim, dtype=dtype).transpose(0, 1) for _ in range(2))
        self.k, self.v = (strided(total, case.kv_heads, case.head_dim, dtype=dtype) for _ in range(2))
        shape = (batch, case.kv_heads, case.max_seqlen_k + 3, case.head_dim)
        self.keys, self.values = (strided(*shape, dtype=dtype) for _ in range(2))
        acc = accumulation_dtype(dtype)
        self.grad_keys, self.grad_values = (random(*shape, dtype=acc) for _ in range(2))
        self.claimed = torch.zeros(total, dtype=torch.bool, device=DEVICE)
        for row, (begin, n, start) in enumerate(zip(begins, case.new, case.starts, strict=True)):
            self.claimed[begin : begin + n] = True
            for packed in (self.q, self.grad, self.k, self.v):
                packed[begin : begin + n] = random(n, *packed.shape[1:], dtype=dtype)
            for trace, packed in ((self.keys, self.k), (self.values, self.v)):
                trace[row, :, :start] = random(case.kv_heads, start, case.head_dim, dtype=dtype)
                trace[row, :, start : start + n] = packed[begin : begin + n].transpose(0, 1)
        ends = [begin + n for begin, n in zip(begins, case.new, strict=True)]
        tables = (indices(*begins), indices(*ends), indices(*case.starts))
        self.rows = RowRanges(*tables, case.max_seqlen_q, case.max_seqlen_k)
        column_end = self.rows.starts + self.rows.q_end - self.rows.q_begin
        self.columns = ColumnRanges(torch.zeros_like(column_end), column_end)
        self.scores = Scores(case.scale, case.window, case.softcap, case.chunk)

    def double(self) -> Problem:
        """The same numbers in float64."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                setattr(other, name, value.double())
        return other


def plain_forward(problem: Problem) -> torch.Tensor:
    """Attention as one writes it in PyTorch: products and probabilities in the dtype, softmax in float32."""
    out = torch.zeros_like(problem.q)
    for begin, end, p, _, _, values in _rows(problem, None):
        out[begin:end] = _ungroup(p.to(problem.dtype) @ values.unsqueeze(1))
    return out


def plain_backward(problem: Problem, lse: torch.Tensor, delta: torch.Tensor):
    """Gradients of q and of all columns, the latter added to the problem's accumulators, in plain PyTorch."""
    grad_q = torch.zeros_like(problem.q)
    grad_keys, grad_values = problem.grad_keys.clone(), problem.grad_values.clone()
    scale, dtype, groups = problem.case.scale, problem.dtype, problem.case.kv_heads
    for row, (begin, end, p, slope, keys, values) in enumerate(_rows(problem, lse)):
        q, grad = (_group(x[begin:end], groups) for x in (problem.q, problem.grad))
        grad_p = (grad @ values.unsqueeze(1).mT).to(p.dtype)
        grad_scores = (p * (grad_p - _group(delta[begin:end].unsqueeze(-1), groups)) * slope).to(dtype)
        grad_q[begin:end] = _ungroup(grad_scores @ keys.unsqueeze(1)) * scale
        columns = slice(keys.shape[1])
        grad_keys[row, :, columns] += ((grad_scores.mT @ q) * scale).sum(1)
        grad_values[row, :, columns] += (p.to(dtype).mT @ grad).sum(1)
    return grad_q, grad_keys, grad_values


def _rows(problem: Problem, lse: torch.Tensor | None):
    """Of every row: tokens, probabilities `[Hkv, G, n, columns]`, the cap's slope, keys and values up to its last."""
    case = problem.case
    for row, (begin, end, start) in enumerate(zip(*(x.tolist() for x in problem.rows[:3]), strict=True)):
        keys, values = (x[row, :, : start + end - begin] for x in (problem.keys, problem.values))
        scores = _group(problem.q[begin:end], case.kv_heads) @ keys.unsqueeze(1).mT * case.scale
        slope = 1.0
        if case.softcap is not None:
            t = torch.tanh(scores / case.softcap)
            scores, slope = case.softcap * t, 1 - t * t
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(start + 1)
        if case.window is not None:
            hidden |= torch.ones_like(hidden).tril(start - case.window)
        if case.chunk is not None:
            at = torch.arange(keys.shape[1], device=hidden.device) // case.chunk
            hidden |= at < at[start:, None]
        scores = scores.to(accumulation_dtype(problem.dtype)).masked_fill(hidden, -torch.inf)
        if lse is None:
            yield begin, end, scores.softmax(-1), slope, keys, values
        else:
            p = torch.exp(scores - _group(lse[begin:end].unsqueeze(-1), case.kv_heads))
            yield begin, end, p, slope, keys, values


def _group(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _ungroup(x: torch.Tensor) -> torch.Tensor:
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def assert_within(
    name: str, got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, factor: float, terms: float = 0.0
) -> None:
    """`got` errs at most `factor` times as much as `plain` (both in the norm), up to the rounding of the result.

    `terms`: norm of what cancels in the result; its rounding is allowed too, or a gradient that vanishes would have
    to vanish to the last bit. Plain PyTorch in float64 cannot measure itself: there it is 1e-12 of the inputs' size,
    which is one. Where `exact` is not finite (poison, log-sum-exp of nothing), `got` is the same.
    """
    double = got.dtype == torch.float64
    rounding = 1e-12 if double else torch.finfo(got.dtype).eps
    got, plain, exact = got.double(), plain.double(), exact.double()
    assert got.shape == exact.shape, name
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{name}: other elements are finite"
    assert torch.equal(got[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0)), name
    error, allowed = ((x - exact)[finite].norm() for x in (got, plain))
    size = exact[finite].norm() + terms + (exact.numel() ** 0.5 if double else 0.0)
    assert error <= factor * allowed + rounding * size, (
        f"{name}: error {error:.3e}, plain PyTorch's {allowed:.3e}, size {size:.3e}"
    )


def check_without_some_tokens(operators, dtype: torch.dtype, vocab: int = 1500) -> None:
    """A bias of minus infinity takes tokens from `expected_embedding`, and whole parts of the vocabulary."""
    torch.manual_seed(0)
    hidden, keys = random(3, 64, dtype=dtype), random(vocab, 64, dtype=dtype)
    bias = torch.full((vocab,), -torch.inf, dtype=dtype, device=DEVICE)
    few = slice(vocab - 300, vocab - 210)
    bias[few] = 0
    temperature = torch.ones(1, device=DEVICE)
    given = (hidden, keys, keys, bias, temperature)
    without = (hidden, keys[few], keys[few], None, temperature)
    got, want = (operators.expected_embedding(*x, 0.4, None) for x in (given, without))
    grads = [operators.expected_embedding_backward(hidden, *x, *want, 0.4, None) for x in (given, without)]
    for mine, theirs in zip((*got, grads[0][0]), (*want, grads[1][0]), strict=True):
        torch.testing.assert_close(mine, theirs)
    # A sum over all rows and tokens, of both signs.
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-3, atol=1e-3)


def logarithm_terms(lse: torch.Tensor) -> float:
    """A relative error in a sum of exponentials is an absolute one in its logarithm."""
    return lse.numel() ** 0.5


def score_terms(problem: Problem, out: torch.Tensor) -> float:
    """A score's gradient is `P (dP - delta)`; with a single key both are equal and nothing is left of them.

    Both are sums of products as large as those of `out` with its gradient, which may cancel too.
    """
    products = (out.double() * problem.grad.double()).abs().sum(-1)[problem.claimed]
    return problem.case.scale * float(products.norm()) * problem.case.head_dim**0.5


def check_delta(problem: Problem, out: torch.Tensor, delta: torch.Tensor) -> None:
    """`delta` is the sum of products `out * grad`, which may cancel."""
    mask, acc = problem.claimed, accumulation_dtype(problem.dtype)
    plain = (out.to(acc) * problem.grad.to(acc)).sum(-1)[mask]
    products = (out.double() * problem.grad.double())[mask]
    terms = float(products.abs().sum(-1).norm())
    assert_within("delta", delta[mask], plain, products.sum(-1), BACKWARD, terms)
