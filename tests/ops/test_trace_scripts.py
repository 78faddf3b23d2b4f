"""Random scripts of calls, cuts and concatenations on traces, against dense caches grown row by row."""

import contextlib

import pytest
import torch
from compare import error
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import Toy

from diffmas_ops import Segment, kv_concat

TOLERANCE = 1e-10
pytestmark = pytest.mark.usefixtures("poison")


class Script:
    """Runs the same steps on traces and on rows' dense caches, and collects one loss for each."""

    def __init__(self, data, backend):
        self.draw, self.backend = data.draw, backend
        heads, kv_heads = self.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
        self.toy = Toy(
            heads=heads, kv_heads=kv_heads, interleaved=self.draw(st.booleans()),
            rotary_dim=self.draw(st.sampled_from([2, 4])), seed=self.draw(st.integers(0, 9)),
            window=self.draw(st.sampled_from([None, None, 1, 3, 8])),
            chunk=self.draw(st.sampled_from([None, None, 1, 4, 7])),
            softcap=self.draw(st.sampled_from([None, 0.7])), sinks=self.draw(st.booleans()),
        )  # fmt: skip
        self.batch = self.draw(st.integers(1, 3))
        self.generator = torch.Generator().manual_seed(0)
        self.traces, self.rows, self.inputs, self.losses = [], [], [], ([], [])
        # What a latent step feeds back: every row's last hidden state.
        self.last = [[torch.zeros(self.toy.width, dtype=torch.float64)] * self.batch for _ in range(2)]

    def new(self):
        self.traces.append(
            self.toy.trace(self.batch, self.draw(st.sampled_from([1, 64])), grow=True, backend=self.backend)
        )
        self.rows.append([self.toy.dense() for _ in range(self.batch)])

    def which(self):
        return self.draw(st.integers(0, len(self.traces) - 1))

    def call(self):
        which = self.which()
        kind = self.draw(st.sampled_from(["one each", "at most one", "many"]))
        one = st.integers(*{"one each": (1, 1), "at most one": (0, 1), "many": (0, 4)}[kind])
        lengths = self.draw(st.lists(one, min_size=self.batch, max_size=self.batch).filter(any))
        mode = self.draw(st.sampled_from(["plain", "plain", "checkpointing", "no_grad"]))
        feedback, scored = self.draw(st.booleans()), self.draw(st.booleans())
        fresh = [
            torch.randn(n, self.toy.width, dtype=torch.float64, generator=self.generator).requires_grad_()
            for n in lengths
        ]
        self.inputs += fresh
        ours, dense = ([x + last[b] for b, x in enumerate(fresh)] if feedback else fresh for last in self.last)
        with torch.no_grad() if mode == "no_grad" else contextlib.nullcontext():
            call = self.traces[which].open(lengths)
            out = self.toy.run(torch.cat(ours), call, checkpointing=mode == "checkpointing").split(lengths)
            expected = [
                self.toy.run_row(x, row) if len(x) else x for x, row in zip(dense, self.rows[which], strict=True)
            ]
        for results, last, losses in zip((out, expected), self.last, self.losses, strict=True):
            for b, result in enumerate(results):
                if len(result):
                    last[b] = result[-1]
                    if scored:
                        losses.append((b + 1) * result.square().sum())
        for a, b in zip(out, expected, strict=True):
            assert error(a, b) <= TOLERANCE

    def detach(self):
        which = self.which()
        self.traces[which].detach_()
        for row in self.rows[which]:
            row.detach_()

    def concat(self):
        segments, rows = [], [[] for _ in range(self.batch)]
        for _ in range(self.draw(st.integers(1, 3))):
            which = self.which()
            lengths = self.traces[which].host_lengths
            assert lengths == [len(row) for row in self.rows[which]] == self.traces[which].lengths.tolist()
            begin = [self.draw(st.integers(0, n)) for n in lengths]
            end = [self.draw(st.integers(b, n)) for b, n in zip(begin, lengths, strict=True)]
            segments.append(Segment(self.traces[which], begin, end))
            for b, pieces in enumerate(rows):
                pieces.append((self.rows[which][b], begin[b], end[b]))
        longest = max(sum(e - b for _, b, e in pieces) for pieces in rows)
        with torch.no_grad() if self.draw(st.integers(0, 4)) == 4 else contextlib.nullcontext():
            self.rows.append([self.toy.concat_rows(pieces) for pieces in rows])
            self.traces.append(
                kv_concat(
                    segments, capacity=max(1, longest), rotary=self.toy.rotary, grow=True,
                    backend=self.backend,
                )
            )  # fmt: skip

    def check(self):
        loss, expected = (sum(losses) for losses in self.losses)
        if not torch.is_tensor(expected) or not expected.requires_grad:
            return
        leaves = self.toy.parameters + self.inputs
        actual = torch.autograd.grad(loss, leaves, allow_unused=True)
        wanted = torch.autograd.grad(expected, leaves, allow_unused=True)
        assert error(loss, expected) <= TOLERANCE
        floor = 1e-5 * float(sum(g.square().sum() for g in wanted if g is not None)) ** 0.5
        for a, w, leaf in zip(actual, wanted, leaves, strict=True):
            a, w = (torch.zeros_like(leaf) if g is None else g for g in (a, w))
            assert error(a, w, floor) <= TOLERANCE


@settings(max_examples=60)
@given(data=st.data())
def test_random_scripts(backend, data):
    script = Script(data, backend)
    script.new()
    steps = ["call"] * 6 + ["concat", "concat", "new", "detach"]
    for step in data.draw(st.lists(st.sampled_from(steps), min_size=3, max_size=12)):
        getattr(script, step)()
    script.check()
