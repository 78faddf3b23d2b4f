"""The fused LoRA layer against PEFT's own, and when it steps aside."""

import pytest
import torch
from compare import error
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from tiny_models import causal_lm, clone, with_lora

from diffmas.models.lora import _LoraLinear, fuse_lora


def layer_of(bias=True):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 10, bias=bias))
    layer = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=["0"])).base_model.model[0].double()
    assert type(layer) is Linear
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def run(layer, x):
    y = layer(x)
    return y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (2, 3, 6), (1, 1, 6)])
def test_equals_peft(shape, bias):
    layer = layer_of(bias).requires_grad_()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = run(layer, x)
    fuse_lora(layer)
    actual = run(layer, x)
    assert type(actual[0].grad_fn).__name__ == "_LoraLinearBackward"
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4), (5,), (2, 4), (5, 2))]
    assert torch.autograd.gradcheck(lambda *t: _LoraLinear.apply(*t, 0.7), tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.merge(),
        lambda layer: layer.lora_dropout.update({"default": torch.nn.Dropout(0.5).eval()}),
        lambda layer: [part["default"].float() for part in (layer.lora_A, layer.lora_B)],
        lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.lora_A["default"].register_forward_hook(lambda m, x, y: 2 * y),
        lambda layer: setattr(layer.base_layer, "forward", lambda x: torch.zeros(len(x), 10).double()),
        lambda layer: layer.scaling.update(default=0.0),
    ],
    ids=["disabled", "merged", "dropout", "dtype", "hook", "adapter's hook", "own forward", "zero scale"],
)
def test_steps_aside(change, request):
    layer = layer_of().eval()
    change(layer)
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = layer(x)
    fuse_lora(layer)
    actual = layer(x)
    fused = type(actual.grad_fn).__name__ == "_LoraLinearBackward"
    assert fused == (request.node.callspec.id == "zero scale")
    torch.testing.assert_close(actual, expected)


def test_whole_model_keeps_its_logits():
    model = with_lora(causal_lm("qwen2"))
    ids = torch.arange(7)[None]
    expected = clone(model)(ids).logits
    fuse_lora(model)
    model.get_base_model().set_attn_implementation("sdpa")
    assert error(model.eval()(ids).logits, expected) < 1e-12
