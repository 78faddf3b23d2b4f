"""A system that was copied, or saved whole and read again, computes what it did."""

import copy
import io
import pickle
from importlib import import_module

import pytest
import torch
from hybrids import TARGETS, hybrid
from tiny_models import arguments, causal_lm, ragged, with_lora

from diffmas.agents.topology import TOPOLOGIES
from diffmas.system import MultiAgentSystem

#: Fused layers, norms and adapters; states that a layer's own code continues, and by one token at a time.
MODELS = {
    "qwen3": lambda: with_lora(causal_lm("qwen3", dtype=torch.float32)),
    "qwen3_next": lambda: with_lora(hybrid("qwen3_next").float(), targets=TARGETS),
    "jamba": lambda: with_lora(hybrid("jamba").float(), targets=TARGETS),
}
NAMES = [agent.name for agent in TOPOLOGIES["sequential"].agents]


def saved(system):
    file = io.BytesIO()
    torch.save(system, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def step(system):
    """Loss, logits and gradients."""
    output = system.train()(*arguments(*ragged(NAMES, 2, longest=4)))
    output.loss.backward()
    return [output.loss.detach(), output.logits.detach(), *(p.grad for p in system.parameters() if p.grad is not None)]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("family", MODELS)
def test_copied_pickled_and_saved(family):
    system = MultiAgentSystem(MODELS[family](), "sequential", latent_steps=2)
    twins = [copy.deepcopy(system), pickle.loads(pickle.dumps(system)), saved(system)]
    expected = step(system)
    for twin in twins:
        modules = dict(twin.named_modules())
        for name, module in system.named_modules():
            assert type(modules[name]) is type(module)
            # It is the twin's modules that its forwards run.
            forward = vars(modules[name]).get("forward")
            assert forward is None or forward.args == (modules[name],)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in system.parameters()}
        assert same(step(twin), expected)
    # And one made anew on a copy of the model alone.
    model = saved(system.agent_model.model)
    model.zero_grad()
    assert same(step(MultiAgentSystem(model, "sequential", latent_steps=2)), expected)


def test_read_by_another_process(monkeypatch):
    """What a process has learned of a family's layers is there in one that has only read the file."""
    system = MultiAgentSystem(MODELS["jamba"](), "sequential", latent_steps=2)
    expected, file = step(system), pickle.dumps(system.agent_model)
    # As a process finds it that has made no system.
    scope, name = import_module("transformers.models.jamba.modeling_jamba"), "mamba_selective_state_update"
    monkeypatch.setattr(scope, name, getattr(scope, name).__wrapped__)
    assert not hasattr(getattr(scope, name), "chosen")
    system.agent_model = system.trajectory.model = pickle.loads(file)
    system.zero_grad()
    assert same(step(system), expected)
    assert hasattr(getattr(scope, name), "chosen")
