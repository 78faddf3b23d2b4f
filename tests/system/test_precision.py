"""A bfloat16 or float16 base under a float32 adapter: as close to the exact result as PEFT on plain PyTorch."""

import copy

import pytest
import torch
from compare import error, gradients
from oracle import batch
from peft import LoraConfig, get_peft_model
from tiny_models import arguments, causal_lm, clone, ragged, with_lora

from diffmas.agents.topology import Agent, Topology
from diffmas.models.lora import fuse_lora
from diffmas.system import MultiAgentSystem

HALF = [torch.bfloat16, torch.float16]
CHAIN = {"a": (), "b": ("a",), "c": ("b",)}


def halved(model, dtype):
    """The base in `dtype`, what is trained as it was."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def fused(y):
    return type(y.grad_fn).__name__ == "_LoraLinearBackward"


def layer_of(bias):
    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 96, bias=bias)), LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    )
    layer = model.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return layer


def differentiate(layer, x, grad):
    x = x.clone().requires_grad_()
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y, [x, *trained], grad.to(y.dtype))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", HALF)
def test_layer_is_at_least_as_exact_as_peft(dtype, rows, bias, autocast):
    layer = halved(layer_of(bias), dtype)
    x, grad = torch.randn(rows, 64).to(dtype), torch.randn(rows, 96).to(dtype)
    truth = differentiate(copy.deepcopy(layer).double(), x.double(), grad.double())
    plain = differentiate(layer, x, grad)
    ours = copy.deepcopy(layer)
    fuse_lora(ours)
    with torch.autocast("cpu", dtype, enabled=autocast):
        actual = differentiate(ours, x.float() if autocast else x, grad)
    assert fused(actual[0]) and not fused(plain[0])
    assert [t.dtype for t in actual[2:]] == [torch.float32] * 2
    for a, p, t in zip(actual, plain, truth, strict=True):
        assert error(a, t) <= 1.5 * error(p, t)


def test_a_float32_base_under_autocast_is_left_to_peft():
    layer = layer_of(True)
    fuse_lora(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused(layer(torch.randn(2, 64)))
    assert fused(layer(torch.randn(2, 64)))


@pytest.mark.parametrize("checkpointing", ["none", "all"])
@pytest.mark.parametrize("dtype", HALF)
def test_trajectory_errs_no_more_than_plain_peft(dtype, checkpointing, backend):
    model = halved(with_lora(causal_lm("qwen3", dtype=torch.float32, initializer_range=0.1), embeddings=False), dtype)
    exact = clone(model).float().double()
    weight = torch.eye(16) + 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    prompts, answers = ragged(list(CHAIN), 4)
    options = dict(handover="full", latent_steps=3)

    def plain(model, dtype):
        model.zero_grad()
        w = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        loss, logits = batch(model, CHAIN, prompts, answers, weight=w.to(dtype), **options)
        loss.backward()
        return loss.detach(), logits.detach(), gradients(model) | {"weight": w.grad}

    topology = Topology("chain", tuple(Agent(*item) for item in CHAIN.items()), "full")
    system = MultiAgentSystem(
        clone(model).train(), topology, latent_steps=3, alignment="learned", checkpointing=checkpointing,
        backend=backend,
    )  # fmt: skip
    system.agent_model.alignment.weight.data.copy_(weight)
    output = system(*arguments(prompts, answers))
    output.loss.backward()
    actual = gradients(system.agent_model.model) | {"weight": system.agent_model.alignment.weight.grad}
    assert {g.dtype for g in actual.values()} == {torch.float32}

    truth, reference = plain(exact, torch.float64), plain(clone(model), dtype)
    assert error(output.logits, truth[1]) <= 2 * error(reference[1], truth[1])
    whole = [torch.cat([g[n].double().flatten() for n in sorted(actual)]) for g in (actual, reference[2], truth[2])]
    assert error(whole[0], whole[2]) <= 3 * error(whole[1], whole[2])
    for part in ("lora_A", "lora_B", "weight"):
        names = [n for n in sorted(actual) if part in n]
        ours, theirs, true = (
            torch.cat([g[n].double().flatten() for n in names]) for g in (actual, reference[2], truth[2])
        )
        assert error(ours, true) <= 3 * error(theirs, true), part
