"""KVTrace and Call: the plan of a call, growth, cuts, one-time differentiation, lifetime, bad input."""

import gc
import weakref

import pytest
import torch
from compare import error
from oracle import attend
from toy import Toy

from diffmas_ops import CapacityError, KVTrace, Segment, cached_attention, kv_concat

SHAPE = dict(num_layers=2, batch=3, num_kv_heads=2, capacity=8, head_dim=4)


def trace(**options):
    return KVTrace.allocate(**SHAPE | options)


def test_the_plan_of_a_ragged_call():
    t = trace()
    t.open([2, 0, 3])
    call = t.open([1, 4, 0])
    assert (call.total, *call.rows[3:], call.streak) == (5, 4, 4, None)
    assert call.rows.q_begin.tolist() == [0, 1, 5] and call.rows.q_end.tolist() == [1, 5, 5]
    assert call.starts.tolist() == [2, 0, 3] and call.ends.tolist() == [3, 4, 3]
    assert call.position_ids.tolist() == [[2, 0, 1, 2, 3]] and call.position_ids.dtype == torch.int64
    assert t.host_lengths == t.lengths.tolist() == [3, 4, 3]
    assert {x.dtype for x in (*call.rows[:3], call.ends, t.lengths)} == {torch.int32}


def test_a_latent_step_is_planned_like_any_other_call():
    quick, general = trace(), trace()
    for t in (quick, general):
        t.open([2, 0, 3])
    general.one_each = None
    a, b = quick.open(1), general.open([1, 1, 1])
    for name in ("starts", "ends", "position_ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert all(map(torch.equal, a.rows[:3], b.rows[:3]))
    assert (a.total, *a.rows[3:]) == (b.total, *b.rows[3:]) == (3, 1, 4)


def test_single_token_calls_in_a_row_share_a_run():
    t = trace()
    a, b, many, c, d = map(t.open, ([1, 1, 1], [1, 0, 1], [2, 0, 0], [0, 1, 0], 1))
    assert a.streak is b.streak and many.streak is None and c.streak is d.streak is not a.streak
    assert [call.slot for call in (a, b, many, c, d)] == [0, 1, 0, 0, 1]
    assert a.streak.starts.tolist() == [0, 0, 0] and c.streak.starts.tolist() == [4, 1, 2]
    t.detach_()
    assert t.open(1).streak is not d.streak


def test_growth_keeps_what_was_written():
    t = trace(capacity=1, grow=True)
    k, v = torch.randn(2, 3, 2, 4)
    cached_attention(k, k, v, t.open(1), layer=0)
    t.open([5, 0, 0])
    assert t.capacity == 6
    t.open([0, 7, 0])
    assert t.capacity == 12
    assert torch.equal(t.keys[0, :, :, 0], k) and torch.equal(t.values[0, :, :, 0], v)


def test_a_failed_open_changes_nothing():
    t = trace()
    t.open([7, 1, 1])
    with pytest.raises(CapacityError, match="needs 9 columns in row 0; capacity is 8"):
        t.open(2)
    assert t.host_lengths == t.lengths.tolist() == [7, 1, 1]
    t.open([1, 7, 7])
    assert t.host_lengths == [8, 8, 8]


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(num_layers=0), ValueError, "num_layers is 0; allowed: integers ≥ 1"),
        (dict(batch=-1), ValueError, "batch is -1"),
        (dict(num_kv_heads=0), ValueError, "num_kv_heads is 0"),
        (dict(capacity=0), ValueError, "capacity is 0"),
        (dict(head_dim=0), ValueError, "head_dim is 0"),
        (dict(capacity=2.5), TypeError, "integer"),
        (dict(dtype=torch.int64), TypeError, "dtype is torch.int64; allowed: torch.float32"),
    ],
)
def test_allocate_refuses(options, error, message):
    with pytest.raises(error, match=message):
        trace(**options)


@pytest.mark.parametrize("lengths", [[1, 1], [1, 1, 1, 1], [1, -1, 1], [0, 0, 0], 0, -1])
def test_open_refuses(lengths):
    with pytest.raises(ValueError, match="lengths is .*allowed: 3 integers ≥ 0"):
        trace().open(lengths)


@pytest.mark.parametrize("lengths", [1.0, [1.0, 1.0, 1.0], [1, 1, 1.5], "abc", None])
def test_open_refuses_what_is_no_integer(lengths):
    with pytest.raises(TypeError, match="integer"):
        trace().open(lengths)


def test_a_call_may_not_outlive_its_trace_before_it_ran():
    t = trace()
    call = t.open(1)
    x = torch.randn(3, 2, 4)
    del t
    with pytest.raises(RuntimeError, match="the trace of this call is gone"):
        cached_attention(x, x, x, call, layer=0)


def test_scale_may_differ_from_call_to_call(backend, poison):
    """Deferred rows of single-token calls carry the scale (and the query heads) of their own call."""
    generator = torch.Generator().manual_seed(0)
    # Two runs of single-token calls around a call of three tokens.
    plan = [(2, 4, 0.5), (1, 4, 0.3), (1, 2, 0.3), (1, 2, 1.7), (3, 4, None), (1, 4, 0.1), (1, 2, None)]
    leaves, keys, values, ours, dense = [], [], [], 0, 0
    t = trace(batch=1, num_layers=1, capacity=10, dtype=torch.float64, backend=backend)
    for n, heads, scale in plan:
        q, k, v = (
            torch.randn(n, h, 4, dtype=torch.float64, generator=generator).requires_grad_() for h in (heads, 2, 2)
        )
        leaves += (q, k, v)
        keys.append(k)
        values.append(v)
        out = cached_attention(q, k, v, t.open(n), layer=0, softmax_scale=scale)
        expected = attend(q, torch.cat(keys), torch.cat(values), sum(map(len, keys)) - n, scale)
        assert error(out, expected) <= 1e-10
        ours, dense = ours + out.square().sum(), dense + expected.square().sum()
    actual, wanted = torch.autograd.grad(ours, leaves), torch.autograd.grad(dense, leaves)
    assert max(error(a, w) for a, w in zip(actual, wanted, strict=True)) <= 1e-10


def _losses(toy, t, lengths=(2, 1, 1, 3)):
    generator = torch.Generator().manual_seed(1)
    for n in lengths:
        x = torch.randn(n * t.batch, toy.width, dtype=torch.float64, generator=generator)
        yield toy.run(x, t.open(n)).square().sum()


def test_a_trace_is_differentiated_once():
    toy = Toy()
    *_, last = _losses(toy, t := toy.trace(2))
    last.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a trace can be differentiated once.*Add the losses"):
        last.backward()
    # An earlier loss shares the calls; a trace of its own would be needed.
    first, *_, last = _losses(toy, t := toy.trace(2))
    last.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a trace can be differentiated once"):
        first.backward()
    del t


def test_an_early_loss_first_then_a_late_one_raises_too():
    toy = Toy()
    t = toy.trace(2)
    first, *_, last = _losses(toy, t)
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a trace can be differentiated once"):
        last.backward()


def test_gradients_are_first_order():
    toy = Toy()
    *_, last = _losses(toy, toy.trace(2))
    (grad,) = torch.autograd.grad(last, toy.parameters[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_only_the_graph_that_is_asked_for_runs():
    """`torch.autograd.grad` for the input of one call prunes the others, but not those that owe it something."""
    toy = Toy()
    for chosen in range(3):
        t, dense = toy.trace(1), toy.dense()
        xs = [torch.randn(n, toy.width, dtype=torch.float64).requires_grad_() for n in (2, 1, 1)]
        ours = sum(toy.run(x, t.open(len(x))).square().sum() for x in xs)
        expected = sum(toy.run_row(x, dense).square().sum() for x in xs)
        (actual,), (wanted,) = (torch.autograd.grad(loss, [xs[chosen]]) for loss in (ours, expected))
        assert error(actual, wanted) <= 1e-10


@pytest.mark.parametrize("threads, times", [(1, 100), (2, 5)])
def test_every_backward_has_the_same_bits(threads, times, backend):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        toy = Toy(heads=4, kv_heads=2, head_dim=16, width=16)

        def run():
            t = toy.trace(3, backend=backend)
            losses = sum(_losses(toy, t))
            moved = kv_concat(
                [Segment(t, [0] * 3, t.host_lengths), Segment(t, [2] * 3, t.host_lengths)],
                capacity=64, rotary=toy.rotary, backend=backend,
            )  # fmt: skip
            return torch.autograd.grad(losses + sum(_losses(toy, moved)), toy.parameters)

        first = run()
        for _ in range(times):
            assert all(map(torch.equal, run(), first))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("concat", [False, True], ids=["", "concat"])
def test_nothing_is_left_when_backward_never_ran(checkpointing, concat):
    toy = Toy()
    gc.collect()
    gc.disable()
    try:
        t = toy.trace(2)
        x = torch.randn(4, toy.width, dtype=torch.float64)
        out = toy.run(x, t.open(2), checkpointing=checkpointing)
        made = [t]
        if concat:
            made.append(kv_concat([Segment(t, [0, 0], [2, 1])], capacity=9, rotary=toy.rotary))
            out = toy.run(out, made[-1].open(2), checkpointing=checkpointing)
        left = [
            weakref.ref(x)
            for m in made
            for x in (m, m.storage, m.gradients, m.keys, m.order, m.order.token, m.order.token.grad_fn)
        ]
        del t, made
        assert sum(r() is not None for r in left) > 0
        del out
        assert not [r() for r in left if r() is not None]
    finally:
        gc.enable()


def test_a_call_without_gradients_leaves_no_graph():
    toy = Toy()
    t = toy.trace(2)
    with torch.no_grad():
        out = toy.run(torch.randn(4, toy.width, dtype=torch.float64), t.open(2))
    assert out.grad_fn is None and t.order.token.grad_fn is None and not t.order.token.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_rehearsals_leave_no_trace(checkpointing, backend, poison):
    """Gradients of the call rehearsed are the real ones, and what comes after has the bits it would have had."""
    toy = Toy()
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(n, toy.width, dtype=torch.float64, generator=generator) for n in (5, 2, 7, 2, 2, 6)]
    cotangents = [torch.randn_like(x) for x in xs]

    class Rehearse(torch.autograd.Function):
        """When the gradient of the call's output is known, all later calls have been differentiated."""

        @staticmethod
        def forward(ctx, out, rehearse):
            ctx.rehearse = rehearse
            return out.clone()

        @staticmethod
        def backward(ctx, gradient):
            ctx.rehearse(gradient)
            return gradient, None

    def run(rehearsals):
        t = toy.trace(2, backend=backend)
        losses, inputs, found = [], [], []
        for i, (x, lengths) in enumerate(zip(xs, ([2, 3], 1, [4, 3], 1, 1, [5, 1]), strict=True)):
            inputs.append(x.clone().requires_grad_())
            call = t.open(lengths)
            out = toy.run(inputs[-1], call, checkpointing=checkpointing)
            if rehearsals and i == 2:
                roots = [t.order.token, out]

                def rehearse(gradient, call=call, roots=roots, x=inputs[-1]):
                    with call.rehearse():
                        for _ in range(2):
                            grads = [torch.zeros(0), gradient]
                            found.extend(torch.autograd.grad(roots, x, grads, retain_graph=True))

                out = Rehearse.apply(out, rehearse)
            losses.append((out * cotangents[i]).sum())
        return found, torch.autograd.grad(sum(losses), [*inputs, *toy.parameters])

    _, plain = run(rehearsals=False)
    found, grads = run(rehearsals=True)
    assert all(map(torch.equal, grads, plain))
    assert len(found) == 2 and all(torch.equal(f, plain[2]) for f in found)


def test_single_token_calls_are_not_rehearsed():
    message = r"lengths is \[1, 0, 1\]; allowed: a call with more than one token"
    with pytest.raises(ValueError, match=message), trace().open([1, 0, 1]).rehearse():
        pass


def test_rewound_columns_are_written_anew():
    toy = Toy()
    t, other = toy.trace(2), toy.trace(2)
    x = torch.randn(10, toy.width, dtype=torch.float64)
    for one in (t, other):
        toy.run(x[:4], one.open(2))
    with torch.no_grad():
        for i in range(2):
            toy.run(x[:2] * i, t.open(1))
    t.rewind([2, 3])
    assert t.host_lengths == t.lengths.tolist() == [2, 3]
    t.rewind([2, 2])
    outs = [toy.run(x[4:], one.open(3)) for one in (t, other)]
    assert torch.equal(*outs) and torch.equal(t.keys[..., :5, :], other.keys[..., :5, :])
    assert t.host_lengths == t.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("cut", ["detach", "select", "concat"])
def test_columns_rewritten_below_a_cut_take_gradient(cut, backend):
    """What was cut is gone; the tokens in its place owe and are owed, in calls of one token and of several."""
    toy = Toy()
    x = torch.randn(4, toy.width, dtype=torch.float64)
    with torch.no_grad():
        t = toy.trace(2, backend=backend)
        toy.run(torch.cat((x, x)), t.open(4))
        if cut == "select":
            t = t.select_rows([0, 1])
        elif cut == "concat":
            t = kv_concat([Segment(t, [0, 0], [4, 4])], capacity=64, rotary=toy.rotary, backend=backend)
    if cut == "detach":
        t.detach_()
    t.rewind([1, 3])
    plan = [[2, 1], [1, 1], [1, 1], [1, 3]]
    inputs = [torch.randn(sum(n), toy.width, dtype=torch.float64).requires_grad_() for n in plan]
    ours = sum(toy.run(y, t.open(n)).square().sum() for y, n in zip(inputs, plan, strict=True))
    dense = [toy.dense() for _ in range(2)]
    with torch.no_grad():
        for row, kept in zip(dense, (1, 3), strict=True):
            toy.run_row(x[:kept], row)
    exact = 0
    for y, n in zip(inputs, plan, strict=True):
        for row, part in zip(dense, y.split(n), strict=True):
            exact = exact + toy.run_row(part, row).square().sum()
    assert error(ours, exact) < 1e-12
    leaves = [*inputs, *toy.parameters]
    for a, e in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves), strict=True):
        assert error(a, e) < 1e-10


@pytest.mark.parametrize("lengths", [[2, 1, 2], [2, 4, 2], [2, 2], [-1, 2, 2]])
def test_rewind_refuses(lengths):
    toy = Toy()
    t = toy.trace(3)
    toy.run(torch.randn(6, toy.width, dtype=torch.float64), t.open(2))
    with torch.no_grad():
        toy.run(torch.randn(3, toy.width, dtype=torch.float64), t.open(1))
    with pytest.raises(ValueError, match=r"lengths is \[.*\]; allowed, row by row: 2 … 3, 2 … 3, 2 … 3"):
        t.rewind(lengths)
    moved = kv_concat([Segment(t, [1] * 3, [3] * 3)], capacity=9, rotary=toy.rotary)
    with pytest.raises(ValueError, match="allowed, row by row: 2 … 2"):
        moved.rewind([1] * 3)
    assert t.host_lengths == [3] * 3


def test_detach_keeps_the_columns_and_cuts_their_gradient():
    toy = Toy()
    t = toy.trace(1)
    x, y = (torch.randn(2, toy.width, dtype=torch.float64).requires_grad_() for _ in range(2))
    toy.run(x, t.open(2))
    before = t.keys[..., :2, :].clone()
    assert t.detach_() is t and t.order.token.grad_fn is None
    out = toy.run(y, t.open(2))
    assert torch.equal(t.keys[..., :2, :], before)
    grad_x, grad_y = torch.autograd.grad(out.sum(), [x, y], allow_unused=True)
    assert grad_x is None and grad_y.any()
