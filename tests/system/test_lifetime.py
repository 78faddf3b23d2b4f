"""Repeatability, and that nothing outlives its use."""

import gc
import weakref

import pytest
import torch
from tiny_models import arguments, causal_lm, clone, ragged, with_lora

import diffmas.agents.scoring
from diffmas.agents.topology import TOPOLOGIES
from diffmas.system import MultiAgentSystem
from diffmas_ops import KVTrace
from diffmas_ops.storage import TraceStorage


def make(topology="stitch", checkpointing=False, **options):
    model = clone(with_lora(causal_lm("qwen3", dtype=torch.float32))).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    system = MultiAgentSystem(model, TOPOLOGIES[topology], latent_steps=2, **options)
    return system, arguments(*ragged([a.name for a in system.topology.agents], 3, longest=5))


def test_a_hundred_runs_are_the_same_bits(backend):
    system, inputs = make("relay", backend=backend)

    def run():
        system.zero_grad()
        output = system(*inputs)
        output.loss.backward()
        return [output.loss, output.logits, *(p.grad for p in system.parameters() if p.grad is not None)]

    first = [t.clone() for t in run()]
    for _ in range(99):
        for name, (again, once) in enumerate(zip(run(), first, strict=True)):
            assert torch.equal(again, once), name


@pytest.fixture
def traces(monkeypatch):
    """Weak references to every trace that gets made, and to its storage, its keys and its gradients."""
    made = []
    original = KVTrace.__init__

    def init(self, storage, *args, **kwargs):
        original(self, storage, *args, **kwargs)
        made.extend(map(weakref.ref, (self, storage, storage.stacks[0].keys, self.gradients)))

    monkeypatch.setattr(KVTrace, "__init__", init)
    return made


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("topology", ["sequential", "stitch", "relay"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("latent_backward", ["exact", "sweeps:2"])
def test_nothing_is_left_after_use(traces, topology, checkpointing, backward, latent_backward):
    """Reference counting alone frees everything: a cycle would wait for a collector that sees no GPU memory."""
    system, inputs = make(topology, checkpointing, latent_backward=latent_backward)
    gc.collect()
    gc.disable()
    try:
        output = system(*inputs)
        assert traces and any(r() is not None for r in traces)
        if backward:
            output.loss.backward()
        del output
        assert not [r() for r in traces if r() is not None]
    finally:
        gc.enable()


def test_evaluation_leaves_no_graph(traces):
    system, inputs = make()
    with torch.no_grad():
        output = system(*inputs)
        trace = system.trajectory.communicate(inputs[0], inputs[1]).trace
    assert output.loss.grad_fn is None and output.logits.grad_fn is None
    assert trace.order.token.grad_fn is None and not trace.keys.requires_grad
    del output, trace
    assert not [r() for r in traces if r() is not None]


def test_a_detached_trajectory_keeps_only_the_last_trace(traces):
    system, inputs = make(detach_trace=True)
    output = system(*inputs)
    assert output.loss.requires_grad
    assert sum(isinstance(r(), TraceStorage) for r in traces) == 1


def test_an_interrupted_trajectory_leaves_nothing(traces, monkeypatch):
    system, inputs = make()

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(diffmas.agents.scoring, "_interleave", fail)
    with pytest.raises(KeyboardInterrupt):
        system(*inputs)
    gc.collect()
    assert not [r() for r in traces if r() is not None]
