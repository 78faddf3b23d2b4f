"""Products of a few rows with a large weight: values at ragged sizes, strides, dtypes; bits; refusals."""

import pytest
import torch

from diffmas_ops import few_rows_matmul, library
from diffmas_ops.few_rows_matmul.reference import few_rows_matmul as reference

needs_library = pytest.mark.skipif(library.failure("cpu") is not None, reason=str(library.failure("cpu")))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def draw(rows, size, out, transposed, dtype):
    generator = torch.Generator().manual_seed(rows * size + out)
    shape = (out, size) if transposed else (size, out)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) / size**0.5
    return torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype), weight.to(dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("size", "out"), [(1, 1), (7, 3), (16, 16), (67, 129), (512, 97), (130, 520)])
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 16, 17, 40])
def test_equals_float64(rows, size, out, transposed, dtype):
    x, weight = draw(rows, size, out, transposed, dtype)
    actual = torch.ops.diffmas.few_rows_matmul(x, weight, transposed)
    exact, size_of_terms = (reference(f(x.double()), f(weight.double()), transposed) for f in (lambda t: t, torch.abs))
    assert actual.dtype == dtype and actual.shape == (rows, out)
    # The a-priori bound of a sum of products in any order (Higham 2002, section 3.1), and the result's own rounding.
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = size * accumulated * size_of_terms + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert ((actual.double() - exact).abs() <= bound).all()


@needs_library
@pytest.mark.parametrize("transposed", [True, False])
def test_strided_operands(transposed):
    x, weight = draw(3, 40, 24, transposed, torch.float32)
    wide_x, wide_weight = (torch.nn.functional.pad(t, (0, 5), value=torch.nan) for t in (x, weight))
    views = wide_x[:, : x.shape[1]], wide_weight[:, : weight.shape[1]]
    assert torch.equal(few_rows_matmul(*views, transposed), few_rows_matmul(x, weight, transposed))


@needs_library
@pytest.mark.parametrize("transposed", [True, False])
def test_bits_do_not_depend_on_threads_or_runs(transposed):
    x, weight = draw(1, 600, 700, transposed, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [few_rows_matmul(x, weight, transposed) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_many_rows_and_odd_strides_are_pytorch_s_own():
    x, weight = draw(17, 12, 10, False, torch.float32)
    assert torch.equal(few_rows_matmul(x, weight, False), x @ weight)
    few, flipped = x[:2], weight.T.contiguous().T
    torch.testing.assert_close(few_rows_matmul(few, flipped, False), few @ weight)


@needs_library
def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.diffmas.few_rows_matmul(torch.ones(2, 3), torch.ones(4, 5), False)
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.diffmas.few_rows_matmul(torch.ones(2, 3), torch.ones(3, 5).double(), False)
