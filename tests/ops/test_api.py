"""The public operators: gradcheck through the autograd wrappers, what `torch.compile` does with them, bad input."""

import re
from pathlib import Path

import pytest
import torch
from compare import error
from oracle import rotate
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from toy import Toy

import diffmas_ops as ops

F64 = dict(dtype=torch.float64)


def leaf(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64).requires_grad_()


class Rerun(torch.autograd.Function):
    """Differentiates a forward of its own every time: a trace is differentiated once, gradcheck does it many times."""

    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    def backward(ctx, grad_out):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.run(*inputs)
        return None, *torch.autograd.grad(out, inputs, grad_out)


def gradcheck(run, inputs):
    return torch.autograd.gradcheck(lambda *x: Rerun.apply(run, *x), inputs, fast_mode=False)


def make_trace(**options):
    sizes = dict(num_layers=1, batch=2, num_kv_heads=2, capacity=8, head_dim=4, dtype=torch.float64)
    return ops.KVTrace.allocate(**sizes | options)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_latent_project(weighted, backend, poison):
    hidden, weight = leaf(3, 5), leaf(5, 5, seed=1) if weighted else None
    assert torch.autograd.gradcheck(lambda h, w: ops.latent_project(h, w, 1.3, backend=backend), (hidden, weight))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased, softcap", [(False, None), (True, 2.0)])
def test_gradcheck_expected_embedding(tied, biased, softcap, backend, poison):
    inputs = [leaf(3, 5), leaf(11, 5, seed=1), leaf(11, 4, seed=2), leaf(11, seed=3), leaf(1, seed=4)]

    def run(hidden, keys, values, bias, temperature):
        return ops.expected_embedding(
            hidden, keys, keys if tied else values, bias=bias if biased else None, temperature=temperature.exp(),
            scale=0.6, softcap=softcap, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("plan", [[(2, 1)], [(2, 0), (1, 1), (1, 1)], [(1, 1), (3, 2), (0, 1), (1, 0), (1, 2)]])
def test_gradcheck_cached_attention(plan, backend, poison):
    totals = [sum(lengths) for lengths in plan]
    inputs = [leaf(n, h, 2, seed=i * 3 + j) for i, n in enumerate(totals) for j, h in enumerate((4, 2, 2))]

    def run(*inputs):
        trace = make_trace(backend=backend, head_dim=2)
        calls = (inputs[i : i + 3] for i in range(0, len(inputs), 3))
        outs = [
            ops.cached_attention(*qkv, trace.open(lengths), layer=0) for lengths, qkv in zip(plan, calls, strict=True)
        ]
        return torch.cat(outs)

    assert gradcheck(run, inputs)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_kv_concat(interleaved, backend, poison):
    rotary = ops.Rotary(torch.tensor([0.9, 0.2], **F64), interleaved)
    inputs = [leaf(n, h, 4, seed=i * 3 + j) for i, n in enumerate((4, 3, 3)) for j, h in enumerate((4, 2, 2))]

    def run(*inputs):
        a, b = make_trace(backend=backend), make_trace(backend=backend, capacity=3)
        ops.cached_attention(*inputs[:3], a.open([3, 1]), layer=0)
        ops.cached_attention(*inputs[3:6], b.open([1, 2]), layer=0)
        # Trace a twice, overlapping: its columns are owed by both.
        segments = [ops.Segment(b, [0, 1], [1, 2]), ops.Segment(a, [1, 0], [3, 1]), ops.Segment(a, [0, 0], [2, 1])]
        trace = ops.kv_concat(segments, capacity=8, rotary=rotary, backend=backend)
        return ops.cached_attention(*inputs[6:], trace.open([1, 2]), layer=0)

    assert gradcheck(run, inputs)


def test_concat_changes_the_dtype_and_leaves_keys_that_do_not_move_as_they_are(backend):
    a = make_trace(dtype=torch.float32)
    k, v = torch.randn(2, 4, 2, 4)
    ops.cached_attention(k, k, v, a.open([3, 1]), layer=0)
    rotary = ops.Rotary(torch.tensor([0.9, 0.2]))
    same = ops.kv_concat([ops.Segment(a, [0, 0], [3, 1])], capacity=3, rotary=rotary, backend=backend)
    assert torch.equal(same.keys[:, 0], a.keys[:, 0, :, :3]) and same.host_lengths == same.lengths.tolist() == [3, 1]
    half = ops.kv_concat(
        [ops.Segment(a, [1, 0], [3, 1])], capacity=3, rotary=rotary, dtype=torch.bfloat16, backend=backend
    )
    turned = rotate(a.keys[:, 0, :, 1:3], -1, rotary.inv_freq).bfloat16()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.keys[:, 0, :, :2], turned)


def test_strided_inputs_and_expanded_gradients(backend):
    """Views as they come from a model, and the gradient of a sum, whose strides are all 0."""
    packed = leaf(2, 8, 3, 4)
    grads = []
    for contiguous in (False, True):
        q, k, v = (x.transpose(0, 1) for x in (packed[0, :4], packed[0, 4:6], packed[1, 2:4]))
        if contiguous:
            q, k, v = (x.contiguous() for x in (q, k, v))
        trace = make_trace(backend=backend)
        out = ops.cached_attention(q, k, v, trace.open([1, 2]), layer=0)
        grads.append(torch.autograd.grad(out.sum(), [packed])[0])
    assert error(*grads) < 1e-14


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_compile_works_around_the_operator_but_not_through_it():
    """A compiled layer gives the same numbers; its graphs break at the call handle, and soon no new ones are made."""
    toy = Toy(num_layers=1)
    x = leaf(4, toy.width)

    def layer(x, call):
        return toy.run(x, call)

    plan = [[2, 2], [1, 3], [3, 1], [4, 0], [2, 2], [3, 1], 1, 1, 1, 1, 1, 1]
    counter = CompileCounterWithBackend("eager")

    def run(layer):
        trace, out, graphs = toy.trace(2), x, []
        for lengths in plan:
            out = layer(out if lengths != 1 else out[-2:], trace.open(lengths))
            graphs.append(counter.frame_count)
        return graphs, out, *torch.autograd.grad(out.square().sum(), [x, *toy.parameters])

    torch._dynamo.reset()
    graphs, *actual = run(torch.compile(layer, backend=counter))
    _, *expected = run(layer)
    assert all(error(a, e) < 1e-12 for a, e in zip(actual, expected, strict=True))
    many, single = graphs[:6], graphs[6:]
    assert many[0] >= 2, "no graph break: the limit this test documents is gone"
    # A call's sizes are plain integers: a second value makes them symbols, a third one nothing new.
    assert many[-2] == many[-1] and single[-2] == single[-1], graphs

    torch._dynamo.reset()
    with pytest.raises(Unsupported):
        run(torch.compile(layer, backend="eager", fullgraph=True))


def segments(trace, **options):
    trace.open([3, 1])
    return [ops.Segment(trace, **dict(begin=[0, 0], end=[3, 1]) | options)]


X = torch.zeros(2, 2, 4, **F64)


@pytest.mark.parametrize(
    "change, error_type, message",
    [
        (dict(layer=1), ValueError, "layer is 1; allowed: 0 … 0"),
        (dict(layer=-1), ValueError, "layer is -1"),
        (dict(q=X[:1]), ValueError, r"q has shape \(1, 2, 4\); allowed: \[2, a multiple of 2, 4\]"),
        (dict(q=torch.zeros(2, 3, 4, **F64)), ValueError, "q has shape"),
        (dict(q=torch.zeros(2, 2, 5, **F64)), ValueError, "q has shape"),
        (dict(q=X[0]), ValueError, "q has shape"),
        (dict(k=X[:, :1]), ValueError, r"k has shape \(2, 1, 4\); allowed: \[2, 2, 4\]"),
        (dict(v=torch.zeros(3, 2, 4, **F64)), ValueError, "v has shape"),
        (dict(q=X.float()), TypeError, "q is torch.float32; allowed: torch.float64, the trace's dtype"),
        (dict(k=X.half()), TypeError, "k is torch.float16"),
        (dict(v=X.to("meta")), ValueError, "v is on meta; allowed: cpu, the trace's device"),
        (dict(q=X.mT.contiguous().mT), ValueError, "q has stride 2 in its last dimension; allowed: 1"),
    ],
)
def test_cached_attention_refuses(change, error_type, message):
    with pytest.raises(error_type, match=message):
        ops.cached_attention(**dict(q=X, k=X, v=X, call=make_trace().open(1), layer=0) | change)


def rotary(n):
    return ops.Rotary(torch.ones(n))


@pytest.mark.parametrize(
    "build, options, error_type, message",
    [
        (lambda t: [], {}, ValueError, "segments is empty"),
        (segments, dict(capacity=2), ValueError, "capacity is 2; allowed: at least 3"),
        (lambda t: segments(t, end=[4, 1]), {}, ValueError, r"segments\[0\] takes columns 0 … 4 of row 0; allowed.* 3"),
        (lambda t: segments(t, begin=[-1, 0]), {}, ValueError, r"segments\[0\] takes columns -1 … 3 of row 0"),
        (lambda t: segments(t, begin=[0, 2]), {}, ValueError, r"segments\[0\] takes columns 2 … 1 of row 1"),
        (lambda t: segments(t, begin=[0]), {}, ValueError, r"segments\[0\] has 1 begins and 2 ends"),
        (lambda t: segments(t) + segments(make_trace(num_layers=2)), {}, ValueError, r"segments\[1\].* num_layers 2"),
        (lambda t: segments(t) + segments(make_trace(num_kv_heads=1)), {}, ValueError, r"\(1, 4\); allowed: \(2, 4\)"),
        (lambda t: segments(t) + segments(make_trace(head_dim=2)), {}, ValueError, r"\(2, 2\); allowed: \(2, 4\)"),
        (lambda t: segments(t) + segments(make_trace(device="meta")), {}, ValueError, "device meta; allowed: cpu"),
        (lambda t: segments(t) + segments(make_trace(dtype=torch.half)), {}, TypeError, r"segments\[1\].*float16"),
        (segments, dict(dtype=torch.float32), TypeError, "dtype is torch.float32"),
        (segments, dict(dtype=torch.int32), TypeError, "dtype is torch.int32"),
        (
            lambda t: segments(t, begin=[1, 0]), dict(rotary=rotary(3)), ValueError,
            r"rotary.inv_freq has shape \(3,\); allowed: \[R/2\] with R ≤ 4",
        ),
        (segments, dict(rotary=rotary(3)), ValueError, "rotary.inv_freq has shape"),
        (segments, dict(backend="fast"), ValueError, "backend is 'fast'"),
    ],
)  # fmt: skip
def test_kv_concat_refuses(build, options, error_type, message):
    with pytest.raises(error_type, match=message):
        ops.kv_concat(build(make_trace()), **dict(capacity=9, rotary=rotary(2)) | options)


@pytest.mark.parametrize(
    "arguments, error_type, message",
    [
        ((torch.zeros(3), None, 1.0), ValueError, r"hidden has shape \(3,\)"),
        ((torch.zeros(2, 3), torch.zeros(3, 2), 1.0), ValueError, r"weight has shape \(3, 2\); allowed: \[3, 3\]"),
        (
            (torch.zeros(2, 3), torch.zeros(3, 3).double(), 1.0),
            TypeError,
            "weight is torch.float64; allowed: torch.float32",
        ),
        ((torch.zeros(2, 3), torch.zeros(3, 3, device="meta"), 1.0), ValueError, "weight is on meta; allowed: cpu"),
        ((torch.zeros(2, 3), None, 0.0), ValueError, "target_norm is 0.0; allowed: > 0"),
        ((torch.zeros(2, 3), None, float("nan")), ValueError, "target_norm is nan"),
        ((torch.zeros(2, 3).int(), None, 1.0), TypeError, "int32"),
    ],
)
def test_latent_project_refuses(arguments, error_type, message):
    with pytest.raises(error_type, match=message):
        ops.latent_project(*arguments)


@pytest.mark.parametrize(
    "outs, lses, error_type, message",
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3), ValueError, r"outs has shape \(2, 3, 4\)"),
        (torch.zeros(0, 3, 2, 4), torch.zeros(0, 3, 2), ValueError, "outs has shape"),
        (torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 1), ValueError, r"lses has shape .*allowed: \(2, 3, 2\)"),
        (
            torch.zeros(2, 3, 2, 4),
            torch.zeros(2, 3, 2).double(),
            TypeError,
            "lses is torch.float64; allowed: torch.float32",
        ),
    ],
)
def test_merge_states_refuses(outs, lses, error_type, message):
    with pytest.raises(error_type, match=message):
        ops.merge_states(outs, lses)


def test_sources_need_no_macro_that_the_oldest_torch_lacks():
    """`TORCH_TARGET_VERSION` hides newer functions from the compiler, but not newer macros: these are in torch 2.11."""
    root = Path(__file__).parents[2] / "csrc"
    found = {m for path in root.rglob("*.*") for m in re.findall(r"\b(?:STD_|STABLE_)?TORCH_[A-Z_]+", path.read_text())}
    assert found == {
        "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_FRAGMENT", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK",
        "TORCH_BOX", "TORCH_ERROR_CODE_CHECK",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, error_type, message",
    [
        (dict(hidden=torch.zeros(3)), ValueError, r"hidden has shape \(3,\); allowed: \[rows, hidden_size\]"),
        (dict(keys=torch.zeros(7, 2)), ValueError, r"keys has shape \(7, 2\); allowed: \[vocab, 3\]"),
        (dict(keys=torch.zeros(0, 3)), ValueError, r"keys has shape \(0, 3\)"),
        (dict(values=torch.zeros(6, 3)), ValueError, r"values has shape \(6, 3\); allowed: \[7, embedding_size\]"),
        (dict(bias=torch.zeros(6)), ValueError, r"bias has shape \(6,\); allowed: \[7\]"),
        (dict(values=torch.zeros(7, 3).double()), TypeError, "values is torch.float64; allowed: torch.float32"),
        (dict(keys=torch.zeros(7, 3, device="meta")), ValueError, "keys is on meta; allowed: cpu"),
        (dict(temperature=0.0), ValueError, "temperature is 0.0; allowed: above 0"),
        (dict(temperature=float("nan")), ValueError, "temperature is nan"),
        (dict(temperature=torch.ones(2)), ValueError, r"temperature has shape \(2,\); allowed: one element"),
        (dict(softcap=-1.0), ValueError, "softcap is -1.0; allowed: above 0"),
    ],
)
def test_expected_embedding_refuses(changes, error_type, message):
    given = dict(hidden=torch.zeros(2, 3), keys=torch.zeros(7, 3), values=torch.zeros(7, 3)) | changes
    with pytest.raises(error_type, match=message):
        ops.expected_embedding(given.pop("hidden"), given.pop("keys"), given.pop("values"), **given)
