"""Logits of a few rows, which are made without the head's module, are those of the module."""

import pytest
import torch

from diffmas.models.head import Head


def head(bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(48, 301, bias=bias).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17])
@torch.no_grad()
def test_few_rows_are_the_module_s(rows, bias, dtype):
    linear, hidden = head(bias, dtype), torch.randn(rows, 48).to(dtype)
    got, want = Head(linear)(hidden), linear(hidden)
    assert got.dtype == want.dtype and got.shape == want.shape
    exact = torch.nn.functional.linear(
        *(None if x is None else x.double() for x in (hidden, linear.weight, linear.bias))
    )
    allowed = 4 * torch.finfo(dtype).eps * max(float(exact.norm()), 1.0)
    assert float((got.double() - exact).norm()) <= allowed


@torch.no_grad()
def test_what_is_put_on_the_head_runs():
    linear, seen = head(), []
    handle = linear.register_forward_hook(lambda module, inputs, output: seen.append(1) or 2 * output)
    hidden = torch.randn(2, 48)
    assert torch.equal(Head(linear)(hidden), 2 * torch.nn.functional.linear(hidden, linear.weight))
    handle.remove()
    linear.forward = lambda hidden: hidden.new_full((len(hidden), 301), 7.0)
    assert Head(linear)(hidden).eq(7).all() and seen


def test_gradients_are_the_module_s():
    linear, hidden = head(), torch.randn(2, 48, requires_grad=True)
    Head(linear)(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, linear.weight.sum(0).expand(2, -1))
    assert linear.weight.grad is not None
