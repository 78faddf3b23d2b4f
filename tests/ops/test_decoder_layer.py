"""The compiled decoder layer against its specification: ragged rows, few and many, biases, adapters, wanted outputs."""

import pytest
import torch
from decoder_layers import LayerProblem

from diffmas_ops import library
from diffmas_ops.decoder_layer import reference

pytestmark = pytest.mark.skipif(library.failure("cpu") is not None, reason=str(library.failure("cpu")))

ROWS = {
    "one token": ([1], [7]),
    "few": ([1, 0, 1], [0, 4, 19]),
    "eight": ([5, 3], [2, 0]),
    "nine": ([5, 4], [2, 0]),
    "many": ([37, 0, 13], [3, 8, 0]),
}
KINDS = {
    "plain": {},
    "no head norms": {"head_norms": False},
    "biases": {"biases": True},
    "q and v adapted": {"adapted": (0, 2), "biases": True},
    "no adapter": {"adapted": ()},
    "outputs": {"outputs": True},
}


def wide(x):
    """The same numbers in float64."""
    if isinstance(x, list | tuple):
        return type(x)(map(wide, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def error(actual, exact):
    return float((actual.double() - exact).norm()) / (float(exact.norm()) or 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_equals_reference(rows, kind, dtype):
    layer = LayerProblem(*ROWS[rows], dtype=dtype, **KINDS[kind])
    for name, make in (
        ("decoder_layer", layer.forward_arguments),
        ("decoder_layer_backward_output", layer.output_arguments),
        ("decoder_layer_backward_input", layer.input_arguments),
    ):
        results = []
        for operators, arguments in ((torch.ops.diffmas, make()), (reference, make()), (reference, wide(make()))):
            results.append(list(getattr(operators, name)(*arguments)))
            if name == "decoder_layer":
                # What was written into the trace.
                results[-1] += arguments[10:12]
        actual, plain, exact = results
        assert len(actual) == len(plain)
        for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
            assert a.shape == p.shape and a.dtype == p.dtype
            # A result of few numbers may happen to be exact in one order of its sums.
            assert error(a, e) <= max(3 * error(p, e), 20 * torch.finfo(dtype).eps), (name, i)


@pytest.mark.parametrize("rows", ["one token", "many"])
def test_reference_is_the_derivative(rows):
    """Each backward operator against autograd through the forward's own functions, the attention cut out."""
    layer = LayerProblem(*ROWS[rows], dtype=torch.float64, biases=True)
    h = layer.h.clone().requires_grad_()
    adapters = [t.requires_grad_() for pair in zip(*layer.parameters[4:6], strict=True) for t in pair]
    parts = reference.Parameters(*layer.parameters)
    norms = layer.parameters[0]
    x = parts.norm(norms[0], h)
    q = parts.rotated(norms[2], parts.linear(reference.Q, x)[0], *layer.turns)
    k = parts.rotated(norms[3], parts.linear(reference.K, x)[0], *layer.turns)
    v = parts.linear(reference.V, x)[0].view(k.shape)
    out = layer.states[3].clone().requires_grad_()
    middle = h + parts.linear(reference.O, out.flatten(1))[0]
    x = parts.norm(norms[1], middle)
    gate, up = (parts.linear(i, x)[0] for i in (reference.GATE, reference.UP))
    result = middle + parts.linear(reference.DOWN, torch.nn.functional.silu(gate) * up)[0]

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
            results.append(torch.ops.diffmas.decoder_layer(*layer.forward_arguments()))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.ones(2, 5), "h has shape"),
        (1, torch.ones(2, 5), "cos has"),
        (3, [torch.ones(3)], "there are 1 norms"),
        (5, [torch.ones(3, 3)] * 6, "there are 6 weights"),
        (9, [1.0], "there are 1 scalings"),
        (16, torch.tensor([7]), "outputs has 7"),
    ],
)
def test_what_does_not_fit_is_named(position, value, message):
    arguments = list(LayerProblem([2], [0]).forward_arguments())
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.diffmas.decoder_layer(*arguments)
