"""`torch.library.opcheck` of every compiled operator: schema, mutation, fake tensors, AOT dispatch."""

import pytest
import torch
from cases import RAGGED, Problem, indices, random
from decoder_layers import LayerProblem

from diffmas_ops import library
from diffmas_ops.cached_attention import reference as attention
from diffmas_ops.need import OPERATORS as OPERATORS_OF
from diffmas_ops.rows import Pending
from diffmas_ops.scores import Scores

DEVICES = [device for device in ("cpu", "cuda") if library.failure(device) is None]
OPERATORS = [name for functions in OPERATORS_OF.values() for name in functions]
pytestmark = pytest.mark.skipif(not DEVICES, reason=str(library.failure("cpu")))


def concat_plan(rotary, dtype):
    begin, counts, dest = indices(0, 2, 1, 3), indices(5, 0, 2, 7), indices(0, 1, 5, 1)
    angles = [random(2, 2, rotary // 2, dtype=dtype) for _ in range(2)] if rotary else [None, None]
    return (*(x.view(2, 2) for x in (begin, counts, dest)), *angles, False)


def samples():
    """Arguments of every operator, several of a kind where it takes optional ones."""
    problem, single = Problem(RAGGED["prefix"], torch.float32), Problem(RAGGED["some single"], torch.float32)
    q, k, v, keys, values = (x.contiguous() for x in (problem.q, problem.k, problem.v, problem.keys, problem.values))
    rows, scores = problem.rows, Scores(problem.case.scale, 7, 20.0, 11)
    grads = problem.grad_keys, problem.grad_values
    yield "kv_append", (k, v, keys, values, rows)
    yield "kv_gather", (*grads, rows, len(k), torch.float16)
    sources = [[random(2, 2, 3, 11, 16, dtype=torch.float32) for _ in range(2)] for _ in range(2)]
    traces = [random(2, 2, 3, 17, 16, dtype=torch.float32) for _ in range(2)]
    for rotary in (None, 8):
        yield "kv_concat", (*sources, *traces, *concat_plan(rotary, torch.float32))
        yield "kv_concat_backward", (*traces, *sources, *concat_plan(rotary, torch.float32))
    hidden, weight = random(3, 20, dtype=torch.float32), random(20, 20, dtype=torch.float32)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    for w, need in ((None, False), (weight, False), (weight, True)):
        yield "latent_project", (hidden, w, 1.5)
        yield "latent_project_backward", (hidden, hidden, w, hidden, hidden.norm(dim=-1), 1.5, need)
    vocabulary, temperature = random(70, 20, dtype=torch.float32).contiguous(), torch.ones(1)
    for bias, cap in ((None, None), (vocabulary[:, 0].contiguous(), 2.0)):
        yield "expected_embedding", (hidden, vocabulary, vocabulary, bias, temperature, 1.5, cap)
        given = (hidden, hidden, vocabulary, vocabulary, bias, temperature, hidden, hidden[:, 0].contiguous(), 1.5, cap)
        yield "expected_embedding_backward", given
    for transposed in (True, False):
        yield "few_rows_matmul", (hidden, weight, transposed)
    yield "cached_attention", (q, k, v, keys, values, rows, scores)
    yield "cached_attention", (q, None, None, keys, values, rows, scores)
    out, lse = attention.cached_attention(q, None, None, keys, values, rows, scores)
    yield "cached_attention_backward_queries", (problem.grad, q, out, lse, keys, values, rows, scores)
    yield (
        "cached_attention_backward_columns",
        (problem.grad, q, lse, lse, keys, values, *grads, rows, problem.columns, scores),
    )
    yield (
        "cached_attention_backward",
        (problem.grad, q, out, lse, keys, values, *grads, rows, problem.columns, scores),
    )
    heads, dim, batch = single.case.heads, single.case.head_dim, len(single.case.new)
    pending = [random(batch, 4, heads, *tail, dtype=torch.float32) for tail in ((dim,), (dim,), (), ())]
    out, lse = attention.cached_attention(single.q, None, None, single.keys, single.values, single.rows, single.scores)
    yield (
        "cached_attention_backward_token",
        (
            single.grad, single.q, out, lse, single.keys, single.values, single.grad_keys, single.grad_values,
            Pending(*pending, single.rows.starts - 1), single.rows, single.scores,
        ),
    )  # fmt: skip
    for layer in (LayerProblem([2, 1], [3, 0]), LayerProblem([5, 9], [1, 4], outputs=True, behind=True)):
        yield "decoder_layer", layer.forward_arguments()
        yield "decoder_layer_backward_output", layer.output_arguments()
        yield "decoder_layer_backward_input", layer.input_arguments()
    yield "merge_states", (random(3, 5, 2, 16, dtype=torch.float32), random(3, 5, 2, dtype=torch.float32))


def mapped(function, x):
    if isinstance(x, list | tuple):
        return type(x)(*map(function, x)) if hasattr(x, "_fields") else type(x)(map(function, x))
    return x


def flat(arguments):
    """As the compiled operators take them."""
    if hasattr(arguments, "flat"):
        return arguments.flat()
    return tuple(y for x in arguments for y in (x if hasattr(x, "_fields") else (x,)))


def finite(x):
    """opcheck compares results: unclaimed tokens and unwritten columns hold numbers here, not poison."""
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.nan_to_num(0.5)
    return mapped(finite, x)


def moved(x, device):
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return mapped(lambda y: moved(y, device), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, device):
    if not library.has_kernel(operator, device):
        pytest.skip(f"no {device} kernel is registered for {operator}")
    checked = 0
    for name, arguments in samples():
        if name == operator:
            torch.library.opcheck(getattr(torch.ops.diffmas, name).default, moved(flat(finite(arguments)), device))
            checked += 1
    assert checked, f"no sample for {operator}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_matches_reference(operator):
    """Fake outputs have the shapes, dtypes and strides of the reference's."""
    from importlib import import_module

    folder = next(f for f, functions in OPERATORS_OF.items() if operator in functions)
    reference = getattr(import_module(f"diffmas_ops.{folder}.reference"), operator)
    for name, arguments in samples():
        if name != operator:
            continue
        arguments = finite(arguments)
        with torch._subclasses.FakeTensorMode() as mode:
            faked = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, flat(arguments))
            fake = getattr(torch.ops.diffmas, operator)(*faked)
        real = reference(*arguments)
        fakes, reals = (torch.utils._pytree.tree_leaves(x, is_leaf=torch.is_tensor) for x in (fake, real))
        pairs = [pair for pair in zip(fakes, reals, strict=True) if pair != (None, None)]
        assert all((f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()) for f, r in pairs)


def test_compiled_graph_is_whole():
    """An operator inside a compiled function breaks no graph; its mutation is seen."""
    problem = Problem(RAGGED["few"], torch.float32)
    if not library.has_kernel("cached_attention", problem.q.device.type):
        pytest.skip("no kernel is registered for cached_attention")

    def layer(q, k, v, keys, values, q_begin, q_end, starts):
        rows = (q_begin, q_end, starts, *problem.rows[3:])
        out, _ = torch.ops.diffmas.cached_attention(q * 2, k, v, keys, values, *rows, *problem.scores)
        return out.sin(), keys.clone()

    q, k, v, keys, values = (finite(x) for x in (problem.q, problem.k, problem.v, problem.keys, problem.values))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    got = compiled(q, k, v, torch.zeros_like(keys), torch.zeros_like(values), *problem.rows[:3])
    want = layer(q, k, v, torch.zeros_like(keys), torch.zeros_like(values), *problem.rows[:3])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
