"""The compiled decoder layer against its specification: ragged rows, few and many, biases, adapters, wanted outputs."""

import math
import re
from functools import partial

import pytest
import torch
from decoder_layers import LayerProblem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from diffmas_ops import library
from diffmas_ops.decoder_layer import reference
from diffmas_ops.layer import DOWN, GATE, UP, BackwardInput, BackwardOutput, Forward, K, O, Parts, Q, V
from diffmas_ops.native import CPU
from diffmas_ops.scores import Scores

pytestmark = pytest.mark.skipif(library.failure("cpu") is not None, reason=str(library.failure("cpu")))

COMPILED = CPU.functions("decoder_layer")
ROWS = {
    "one token": ([1], [7]),
    "few": ([1, 0, 1], [0, 4, 19]),
    "sixteen": ([9, 7], [2, 0]),
    "seventeen": ([9, 8], [2, 0]),
    "many": ([37, 0, 13], [3, 8, 0]),
}
#: GELU by the hyperbolic tangent.
GELU = (2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715)
KINDS = {
    "plain": {},
    "no head norms": {"head_norms": False},
    "biases": {"biases": range(7)},
    "biases of q, k and v": {"biases": (0, 1, 2)},
    "q and v adapted": {"adapted": (0, 2), "biases": range(7)},
    "no adapter": {"adapted": ()},
    "outputs": {"outputs": True},
    "norms of all heads": {"all_heads": True},
    "norms behind": {"before": False, "behind": True, "all_heads": True, "outputs": True},
    "norms on both sides": {"behind": True, "head_norms": False, "parts": (1.0, *GELU, 0.4)},
    "windows": {"outputs": True, "scores": Scores(0.3, window=4, softcap=1.5, chunk=8)},
}


def wide(x):
    """The same numbers in float64."""
    if isinstance(x, list | tuple):
        return x._make(map(wide, x)) if hasattr(x, "_make") else type(x)(map(wide, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def error(actual, exact):
    return float((actual.double() - exact).norm()) / (float(exact.norm()) or 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_equals_reference(rows, kind, dtype):
    assert_equals_reference(LayerProblem(*ROWS[rows], dtype=dtype, **KINDS[kind]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 4, 5, 8, 16, 20, 32, 64])
@pytest.mark.parametrize("rows", ["one token", "few"])
def test_ranks(rows, rank, dtype):
    assert_equals_reference(LayerProblem(*ROWS[rows], dtype=dtype, rank=rank, biases=(0, 2, 4)), dtype)


def assert_equals_reference(layer, dtype):
    for name, make in (
        ("decoder_layer", layer.forward_arguments),
        ("decoder_layer_backward_output", layer.output_arguments),
        ("decoder_layer_backward_input", layer.input_arguments),
    ):
        results = []
        for functions, arguments in ((COMPILED, make()), (reference, make()), (reference, wide(make()))):
            found = getattr(functions, name)(*arguments)
            if name == "decoder_layer":
                result, saved = found
                # What was written into the trace.
                found = [result, *saved, arguments.keys, arguments.values]
            results.append(found)
        actual, plain, exact = results
        assert len(actual) == len(plain)
        for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
            assert a.shape == p.shape and a.dtype == p.dtype
            # A result of few numbers may happen to be exact in one order of its sums.
            assert error(a, e) <= max(3 * error(p, e), 20 * torch.finfo(dtype).eps), (name, i)


@pytest.mark.parametrize("kind", ["biases", "norms of all heads", "norms behind", "norms on both sides"])
@pytest.mark.parametrize("rows", ["one token", "many"])
def test_reference_is_the_derivative(rows, kind):
    """Each backward operator against autograd through the forward's own functions, the attention cut out."""
    layer = LayerProblem(*ROWS[rows], dtype=torch.float64, **KINDS[kind] | {"outputs": False})
    h = layer.h.clone().requires_grad_()
    adapters = [t.requires_grad_() for pair in zip(layer.parameters.a, layer.parameters.b, strict=True) for t in pair]
    linear, norm, rotated = (
        partial(f, layer.parameters) for f in (reference.linear, reference.norm, reference.rotated)
    )
    x = norm(0, h)
    q = rotated(2, linear(Q, x)[0], layer.turns)
    k = rotated(3, linear(K, x)[0], layer.turns)
    v = linear(V, x)[0].view(k.shape)
    out = layer.saved.out.clone().requires_grad_()
    parts = Parts(*layer.parameters.parts)
    scale = parts.residual_scale
    middle = h + scale * norm(4, linear(O, out.flatten(1))[0])
    x = norm(1, middle)
    gate, up = (linear(i, x)[0] for i in (GATE, UP))
    gelu = parts.cubic > 0
    active = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
    result = middle + scale * norm(5, linear(DOWN, active * up)[0])

    grad, *attention = layer.grads
    expected = torch.autograd.grad(result, [middle, out, *adapters[6:]], grad, retain_graph=True)
    with torch.no_grad():
        grad_middle, grad_out, _, *owed = reference.decoder_layer_backward_output(*layer.output_arguments())
        for a, e in zip((grad_middle, grad_out, *owed), expected, strict=True):
            torch.testing.assert_close(a, e)
        owed = reference.decoder_layer_backward_input(*layer.input_arguments())
    expected = torch.autograd.grad([q, k, v, middle], [h, *adapters[:6]], [*attention, grad])
    for a, e in zip(owed, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_bits_do_not_depend_on_threads():
    layer = LayerProblem(*ROWS["few"])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.diffmas.decoder_layer(*layer.forward_arguments().flat()))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


OPERATORS = {
    "decoder_layer": LayerProblem.forward_arguments,
    "decoder_layer_backward_output": LayerProblem.output_arguments,
    "decoder_layer_backward_input": LayerProblem.input_arguments,
}
BUNDLES = {
    "decoder_layer": Forward,
    "decoder_layer_backward_output": BackwardOutput,
    "decoder_layer_backward_input": BackwardInput,
}
BACKENDS = ("cpu", "reference")


def run(backend, operator, arguments):
    """The compiled operator, or its specification, on flat arguments."""
    if backend == "cpu":
        return getattr(torch.ops.diffmas, operator)(*arguments)
    return getattr(reference, operator)(*BUNDLES[operator].of(*arguments))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("outputs", [False, True])
def test_flat_arguments_are_the_bundled_ones(operator, outputs):
    given = OPERATORS[operator](LayerProblem([2, 3], [0, 1], outputs=outputs, parts=Parts(cubic=0.1)))
    again, flat = BUNDLES[operator].of(*given.flat()), given.flat()
    assert len(flat) == len(named_arguments(operator, LayerProblem([1], [0])))
    assert all(a is b for a, b in zip(again.flat(), flat, strict=True))
    for field, value in given._asdict().items():
        if isinstance(value, tuple):
            assert all(a is b for a, b in zip(getattr(again, field), value, strict=True)), field


def named_arguments(operator, problem):
    schema = getattr(torch.ops.diffmas, operator).default._schema
    return dict(zip((a.name for a in schema.arguments), OPERATORS[operator](problem).flat(), strict=True))


def cut(operator, problem):
    """Every tensor argument one number shorter in one dimension: `(who is to be named, all arguments)`."""
    for name, given in named_arguments(operator, problem).items():
        tensors = list(enumerate(given)) if isinstance(given, list) else [(None, given)]
        for i, tensor in tensors:
            if not isinstance(tensor, torch.Tensor) or name == "outputs":
                continue
            # The first sizes of parameters and of what counts tokens are others' to follow.
            own = name not in ("norms", "weights", "biases", "a", "b", "keys")
            for dim in {0, tensor.dim() - 1} if own else {tensor.dim() - 1}:
                arguments = named_arguments(operator, problem)
                short = tensor.narrow(dim, 0, tensor.shape[dim] - 1)
                arguments[name] = short if i is None else [*given[:i], short, *given[i + 1 :]]
                who = name if i is None else f"{name}[{i}]"
                if dim == 0 and (operator, name) in FOLLOWED:
                    who = FOLLOWED[operator, name]
                yield who, arguments


FOLLOWED = {
    ("decoder_layer", "h"): "cos",
    ("decoder_layer_backward_output", "cos"): "sin",
    ("decoder_layer_backward_input", "h"): "cos",
}


@pytest.mark.parametrize("backend", [*BACKENDS, "fake"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_size_that_does_not_fit_is_named(operator, backend):
    problem = LayerProblem([2, 3], [0, 1], biases=range(7), behind=True)
    seen = set()
    for who, arguments in cut(operator, problem):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            if backend == "fake":
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    fakes = tree_map_only(torch.Tensor, mode.from_tensor, tuple(arguments.values()))
                    getattr(torch.ops.diffmas, operator)(*fakes)
            else:
                run(backend, operator, arguments.values())
        assert re.search(rf"(^|, ){re.escape(who)} has .*; allowed: ", str(caught.value)), who
        seen.add(who)
    assert len(seen) > 40


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_another_dtype_is_named(operator, backend):
    problem = LayerProblem([2, 3], [0, 1], outputs=True, biases=range(7), behind=True)
    first = "grad" if operator == "decoder_layer_backward_output" else "h"
    for name, given in named_arguments(operator, problem).items():
        if name == first or name == "scalings" or not isinstance(given, torch.Tensor | list):
            continue
        for i in range(len(given)) if isinstance(given, list) else [None]:
            arguments = named_arguments(operator, problem)
            tensor = given if i is None else given[i]
            other = tensor.to(torch.float16 if tensor.is_floating_point() else torch.int16)
            arguments[name] = other if i is None else [*given[:i], other, *given[i + 1 :]]
            with pytest.raises((RuntimeError, TypeError), match=re.escape(name if i is None else f"{name}[{i}]")):
                run(backend, operator, arguments.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norms=[torch.ones(3)]), "there are 1 norms; allowed: 4, or 6"),
        (dict(weights=[torch.ones(3, 3)] * 6), "there are 6 weights; allowed: 7"),
        (dict(biases=[torch.empty(0)]), "there are 1 biases; allowed: 7, or none"),
        (dict(parts=[1.0]), "there are 1 parts; allowed: 4, or none"),
        (dict(scalings=[1.0]), "there are 1 scalings; allowed: 7"),
        (dict(epsilon=-1.0), "epsilon is -1.*; allowed: 0 and above"),
        (dict(epsilon=float("nan")), "epsilon is .*nan; allowed: 0 and above"),
        (dict(outputs=torch.tensor([0, 1, 3, 7])), "outputs has 7; allowed: 0 to 4"),
        (dict(outputs=torch.tensor([-1, 1, 3, 4])), "outputs has -1; allowed: 0 to 4"),
        (dict(max_seqlen_q=-1), "max_seqlen_q is -1; allowed: 0 and above"),
        (dict(max_seqlen_q=2), "max_seqlen_q is 2; allowed: at least the 3 tokens of row 1"),
        (dict(query_max_seqlen_q=-1), "query_max_seqlen_q is -1; allowed: 0 and above"),
        (dict(query_max_seqlen_q=1), "query_max_seqlen_q is 1; allowed: at least the 2 tokens of row 0"),
        (dict(max_seqlen_k=7), "max_seqlen_k is 7; allowed: 0 to 6, the capacity of keys"),
        (dict(q_end=torch.tensor([2, 6], dtype=torch.int32)), "q_end.1. are 2, 6; allowed: 0 <= .* <= 5"),
        (dict(starts=torch.tensor([0, 4], dtype=torch.int32)), "starts.1. is 4; allowed: 0 to 3"),
        (dict(query_end=torch.tensor([2, 5], dtype=torch.int32)), "query_end.1. are 2, 5; allowed: 0 <= .* <= 4"),
        (dict(query_starts=torch.tensor([0, 3], dtype=torch.int32)), "query_starts.1. is 3; allowed: 0 to 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_before_anything_is_written(change, message, backend):
    problem = LayerProblem([2, 3], [0, 1], outputs=True)
    arguments = named_arguments("decoder_layer", problem) | change
    with pytest.raises((RuntimeError, ValueError), match=message):
        run(backend, "decoder_layer", arguments.values())
    assert torch.equal(arguments["keys"], problem.trace[0]) and torch.equal(arguments["values"], problem.trace[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["decoder_layer_backward_output", "decoder_layer_backward_input"])
def test_a_backward_takes_as_many_rows_as_outputs(operator, backend):
    arguments = named_arguments(operator, LayerProblem([2, 3], [0, 1], outputs=True))
    arguments["outputs"] = torch.arange(3)
    with pytest.raises((RuntimeError, ValueError), match=r" has shape \[4, .*; allowed: \[3, "):
        run(backend, operator, arguments.values())
    arguments["outputs"] = torch.tensor([0, 1, 3, 5])
    with pytest.raises((RuntimeError, ValueError), match="outputs has 5; allowed: 0 to 4"):
        run(backend, operator, arguments.values())
