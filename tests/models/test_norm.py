"""The fused RMS norm against each family's own, and which modules it leaves alone."""

import copy

import pytest
import torch
from compare import error
from tiny_models import FAMILIES, causal_lm
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from diffmas.models.norm import _RMSNorm, fuse_norms


def run(module, x):
    y = module(x)
    return y, *torch.autograd.grad(y.cos().sum(), [x, module.weight])


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_model_s_own(family):
    model = causal_lm(family, dtype=torch.float32)
    for shape in ((1, 1), (2, 5), (3,)):
        norm = copy.deepcopy(model.get_decoder().norm)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(*shape, norm.weight.numel(), requires_grad=True)
        expected = run(norm, x)
        fuse_norms(norm)
        actual = run(norm, x)
        assert type(actual[0].grad_fn).__name__ == "_RMSNormBackward"
        assert all(error(a, e) < 1e-6 for a, e in zip(actual, expected, strict=True))


def test_gradcheck():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda *t: _RMSNorm.apply(*t, 1e-6), (x, weight))


class _RMSNormWithBias(LlamaRMSNorm):
    """As good as its base at first."""

    def __init__(self, size):
        super().__init__(size)
        self.bias = torch.nn.Parameter(torch.zeros(size))

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.bias


_RMSNormWithBias.__name__ = "LlamaRMSNorm"


@pytest.mark.parametrize(
    "module",
    [Gemma2RMSNorm(8), CohereLayerNorm(8), torch.nn.LayerNorm(8), torch.nn.RMSNorm(8), _RMSNormWithBias(8)],
)
def test_other_norms_are_left_alone(module):
    fuse_norms(module)
    assert "forward" not in vars(module)


def test_what_has_changed_since_it_was_fused_is_seen():
    norm, x = LlamaRMSNorm(8), torch.randn(3, 8)
    fuse_norms(norm)
    norm.variance_epsilon, norm.weight = 0.5, torch.nn.Parameter(torch.full((8,), 3.0))
    plain = LlamaRMSNorm(8, 0.5)
    plain.weight = norm.weight
    assert error(norm(x), plain(x)) < 1e-6
    norm.__class__ = _RMSNormWithBias
    norm.bias = torch.nn.Parameter(torch.ones(8))
    assert error(norm(x), plain(x) + 1) < 1e-6


def test_other_dtypes_keep_the_model_s_own():
    norm = causal_lm("qwen3", dtype=torch.float32).get_decoder().norm
    x = torch.randn(3, norm.weight.numel())
    expected = copy.deepcopy(norm).bfloat16()(x.bfloat16())
    fuse_norms(norm)
    assert torch.equal(norm.bfloat16()(x.bfloat16()), expected)
