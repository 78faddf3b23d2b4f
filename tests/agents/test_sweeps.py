"""Latent rollouts differentiated by sweeps: exact from k = m on; below, the paths of k or more hops are missing."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from compare import assert_same, error, gradients
from tiny_models import arguments, causal_lm, clone, ragged, with_lora

from diffmas.agents.latent_rollouts import step_by_step
from diffmas.agents.topology import TOPOLOGIES, Agent, Topology
from diffmas.models.activation_checkpointing import CHECKPOINTING
from diffmas.system import MultiAgentSystem

TOLERANCE = 1e-10
DIAMOND = Topology(
    "diamond",
    (Agent("root"), Agent("left", ("root",)), Agent("right", ("root",)), Agent("join", ("right", "left", "root"))),
)
SYSTEMS = {**{name: TOPOLOGIES[name] for name in ("sequential", "hierarchical", "stitch", "relay")}, "diamond": DIAMOND}


@cache
def lora_model(**overrides):
    return with_lora(causal_lm("qwen3", **overrides))


def build(topology="relay", handover="latent", latent_steps=5, alignment="identity", initializer_range=0.3, **options):
    chosen = SYSTEMS[topology]
    return MultiAgentSystem(
        clone(lora_model(initializer_range=initializer_range)).train(),
        Topology(chosen.name, chosen.agents, handover),
        latent_steps=latent_steps,
        alignment=alignment,
        **options,
    )


def differentiate(system, rows=3):
    """Logits, and gradients from random cotangents of theirs."""
    system.zero_grad()
    logits = system(*arguments(*ragged([a.name for a in system.topology.agents], rows))).logits
    generator = torch.Generator().manual_seed(3)
    logits.backward(torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype))
    return logits.detach(), {n: g.clone() for n, g in gradients(system).items()}


def flat(grads):
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


@cache
def exact(*args):
    return differentiate(build(*args))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("alignment", ["identity", "ridge", "learned", "soft"])
@pytest.mark.parametrize("handover", ["full", "latent"])
@pytest.mark.parametrize("topology", SYSTEMS)
@pytest.mark.usefixtures("poison")
def test_as_many_sweeps_as_steps_are_exact(topology, handover, alignment, checkpointing):
    for_all = (topology, handover, 5, alignment)
    logits, grads = differentiate(build(*for_all, latent_backward="sweeps:5", checkpointing=checkpointing))
    expected, wanted = exact(*for_all)
    assert error(logits, expected) <= TOLERANCE
    assert grads.keys() == wanted.keys() and ("agent_model.alignment.weight" in grads) == (alignment == "learned")
    assert_same(grads, wanted, TOLERANCE)


@pytest.mark.parametrize("latent_steps, sweeps", [(0, 1), (1, 1), (2, 2), (5, 9)])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_any_number_of_steps(latent_steps, sweeps, backend):
    options = dict(latent_backward=f"sweeps:{sweeps}", backend=backend)
    logits, grads = differentiate(build("sequential", "full", latent_steps, "learned", **options))
    expected, wanted = exact("sequential", "full", latent_steps, "learned")
    assert error(logits, expected) <= TOLERANCE
    assert_same(grads, wanted, TOLERANCE)


def damped(factor):
    """Latent steps whose gradient is multiplied by `factor` at every hop from one to the next."""

    def run(model, steps, trace, hidden):
        step = model.alignment(hidden)
        for _ in range(steps - 1):
            step = model.alignment(model.read(trace, trace.one_each, inputs_embeds=step))
            step.register_hook(lambda gradient: factor * gradient)
        model.read(trace, trace.one_each, inputs_embeds=step)

    return run


def test_truncation_leaves_out_the_paths_of_k_or_more_hops():
    """The exact gradient as a polynomial of the damping: its i-th coefficient is that of the paths of i hops."""
    m = 5
    system = build(latent_steps=m, alignment="learned")
    factors = torch.linspace(-1, 1, m, dtype=torch.float64)
    damped_gradients = []
    for factor in factors.tolist():
        system.trajectory = replace(system.trajectory, latent_rollout=damped(factor))
        damped_gradients.append(flat(differentiate(system)[1]))
    hops = torch.linalg.solve(torch.linalg.vander(factors), torch.stack(damped_gradients))
    whole = hops.sum(0)
    assert error(whole, flat(exact("relay", "latent", m, "learned")[1])) <= TOLERANCE
    for k in range(1, m + 1):
        grads = flat(differentiate(build(latent_steps=m, alignment="learned", latent_backward=f"sweeps:{k}"))[1])
        assert error(grads, hops[:k].sum(0)) <= TOLERANCE
        assert k == m or error(grads, whole) > 1e-3


def test_the_error_falls_with_every_sweep():
    """Where hops contract, as in a model whose layers change little: not for every model."""
    options = dict(latent_steps=5, alignment="learned", initializer_range=0.1)
    wanted = flat(differentiate(build(**options))[1])
    errors = [
        error(flat(differentiate(build(**options, latent_backward=f"sweeps:{k}"))[1]), wanted) for k in range(1, 6)
    ]
    assert all(later < 0.9 * earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors
    assert errors[3] > 1e-4 and errors[4] <= TOLERANCE, errors


def test_nothing_to_do_where_the_trace_is_cut():
    (expected, wanted), (logits, grads) = (
        differentiate(build("sequential", "full", detach_trace=True, latent_backward=b)) for b in ("exact", "sweeps:2")
    )
    assert torch.equal(logits, expected)
    assert grads.keys() == wanted.keys() and all(torch.equal(grads[n], wanted[n]) for n in wanted)


def test_without_gradients_steps_are_taken_once():
    system = build(latent_backward="sweeps:2")
    calls = []
    system.agent_model.observers.append(lambda call, latent: calls.append(call))
    inputs = arguments(*ragged(["sender", "solver"], 3))
    with torch.no_grad():
        quiet = system(*inputs).logits
    assert len(calls) == 1 + 5 + 1
    calls.clear()
    loud = system(*inputs).logits
    assert len(calls) == 1 + 5 + 1 + 1 and calls[-2].lengths == [5, 5, 5]
    assert error(loud, quiet) <= TOLERANCE


def test_the_same_bits_every_time():
    runs = [differentiate(build("stitch", latent_backward="sweeps:3")) for _ in range(3)]
    for logits, grads in runs[1:]:
        assert torch.equal(logits, runs[0][0]) and all(torch.equal(grads[n], g) for n, g in runs[0][1].items())


def test_float32_is_exact_to_rounding():
    def measured(latent_backward):
        model = clone(with_lora(causal_lm("qwen3", dtype=torch.float32, initializer_range=0.1))).train()
        system = MultiAgentSystem(model, TOPOLOGIES["sequential"], latent_steps=5, latent_backward=latent_backward)
        return differentiate(system)

    (expected, wanted), (logits, grads) = measured("exact"), measured("sweeps:5")
    assert error(logits, expected) <= 1e-5 and error(flat(grads), flat(wanted)) <= 1e-5


def test_a_system_without_trainable_parameters_records_nothing():
    model = clone(causal_lm("qwen3"))
    model.requires_grad_(False)
    system = MultiAgentSystem(model, TOPOLOGIES["relay"], latent_steps=3, latent_backward="sweeps:2")
    assert not system(*arguments(*ragged(["sender", "solver"], 2))).loss.requires_grad


@pytest.mark.parametrize("given", ["", "sweep:2", "sweeps", "sweeps:", "sweeps:0", "sweeps:-1", "sweeps:1.5", "Exact"])
def test_bad_values_are_named(given):
    with pytest.raises(ValueError, match=f"latent_backward is '{given}'; allowed: exact, or sweeps:k with an integer"):
        build(latent_backward=given)


def test_exact_is_the_default():
    assert build().trajectory.latent_rollout is build(latent_backward="exact").trajectory.latent_rollout is step_by_step
