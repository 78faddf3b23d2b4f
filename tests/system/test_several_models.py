"""Agents on models of different families, sizes and vocabularies: values and gradients are those of each row alone."""

import pytest
from bridge_oracle import batch
from compare import assert_same, error, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from test_bridges import TOLERANCE, actual, randomised
from tiny_models import VOCAB, arguments, causal_lm, clone, ragged, with_lora

from diffmas.agents.topology import BRIDGE_STATES, Agent, Topology
from diffmas.models.errors import UnsupportedModelError
from diffmas.system import MultiAgentSystem

STEPS = 3
#: Families, and sizes in which they differ.
MODELS = {
    "small": ("qwen3", {}),
    "large": ("llama", dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
                            vocab_size=VOCAB + 4)),
    "third": ("qwen2", dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, tied=True,
                            vocab_size=VOCAB + 9)),
}  # fmt: skip
#: Agents, their senders, and the models they run on.
TEAMS = {
    "pair": dict(sender=((), "small"), solver=(("sender",), "large")),
    # A trace goes on in the same model, with another model's agents between.
    "there and back": dict(a=((), "large"), b=(("a",), "small"), c=(("b", "a"), "large"), d=(("c",), "large")),
    "three": dict(a=((), "small"), b=((), "large"), c=(("a", "b"), "third"), d=(("c", "a"), "small")),
}


def topology_of(name, models=True, **options):
    team = TEAMS[name]
    agents = (Agent(agent, senders, model=model if models else "") for agent, (senders, model) in team.items())
    return Topology(name, tuple(agents), models={m: {} for m in dict.fromkeys(m for _, m in team.values())}, **options)


def models_of(topology):
    found = {}
    for seed, name in enumerate(topology.model_names):
        family, sizes = MODELS[name]
        model = with_lora(causal_lm(family, seed=seed, **sizes), adapters=topology.adapters_on(name)[1:])
        found[name] = clone(model).train()
    return found


def system_on(topology, **options):
    options = dict(latent_steps=STEPS, bridge_initial="random", alignment="learned") | options
    system = MultiAgentSystem(models_of(topology), topology, **options)
    randomised(system.bridges, 5)
    for model in system.models.values():
        if model.alignment.options.trains:
            randomised(model.alignment, 2)
    system.choose_trained()
    return system


def expected(system, prompts, answers):
    """Loss, logits, and gradients by the system's own names."""
    topology = system.topology
    dag = {agent.name: agent.senders for agent in topology.agents}
    bridged = {agent.name: topology.bridged(agent) for agent in topology.agents}
    twins = {name: clone(model.model) for name, model in system.models.items()}
    places = ["agent_model", *(f"other_models.{i}" for i in range(len(twins) - 1))]
    by_agent = {agent.name: twins[topology.model_of(agent)] for agent in topology.agents}
    weights = {e: {n: p.detach().clone().requires_grad_() for n, p in system.bridges[e].named_parameters()}
               for e in topology.bridge_edges}  # fmt: skip
    project = {}
    for name, twin in twins.items():
        twin.zero_grad()
        if (weight := system.models[name].alignment.weight) is not None:
            project[id(twin)] = weight.detach().clone().requires_grad_()

    def turn(agent):
        agent = next(a for a in topology.agents if a.name == agent)
        for module in by_agent[agent.name].modules():
            if isinstance(module, BaseTunerLayer):
                module._active_adapter = [topology.adapter_of(agent)]

    loss, logits = batch(
        by_agent, dag, bridged, prompts, answers, weights=weights, handover=topology.handover,
        latent_steps=system.latent_steps, detach=system.trajectory.detach_trace, project=project, turn=turn,
        bridge_states=topology.bridge_states,
    )  # fmt: skip
    loss.backward()
    found = {f"{e}.{n}": p.grad for e, w in weights.items() for n, p in w.items() if p.grad is not None}
    for place, (name, twin) in zip(places, twins.items(), strict=True):
        found |= {f"{place}.model.{n}": g for n, g in gradients(twin).items()}
        if system.models[name].alignment.options.trains and project[id(twin)].grad is not None:
            found[f"{place}.alignment.weight"] = project[id(twin)].grad
    return loss.detach(), logits.detach(), found


def check(system, prompts, answers):
    loss, logits, wanted = expected(system, prompts, answers)
    output = system(*arguments(prompts, answers))
    output.loss.backward()
    assert error(output.loss, loss) <= TOLERANCE and error(output.logits, logits) <= TOLERANCE
    found = actual(system)
    assert_same(found, wanted, TOLERANCE)
    return found


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", TEAMS)
def test_exactness(name, rows):
    topology = topology_of(name, adapters="per_role", bridge_states="full" if rows == 7 else "latent")
    found = check(system_on(topology, checkpointing="all"), *ragged(list(TEAMS[name]), rows))
    places = ["agent_model", *(f"other_models.{i}" for i in range(len(topology.model_names) - 1))]
    for place in places:
        assert any("lora_A" in n and n.startswith(place) and g.abs().sum() > 0 for n, g in found.items())
    assert all(found[f"{edge}.linear.weight"].abs().sum() > 0 for edge in topology.bridge_edges)


@pytest.mark.parametrize("name", ["pair", "there and back"])
@pytest.mark.parametrize(
    "options",
    [
        dict(bridge="mlp"), dict(detach_trace=True), dict(latent_backward="sweeps:3"), dict(checkpointing="prefill"),
        dict(handover="bridge"),
    ],
    ids=str,
)  # fmt: skip
def test_options(name, options):
    handover = options.get("handover", "")
    options = {k: v for k, v in options.items() if k != "handover"}
    check(system_on(topology_of(name, handover=handover), **options), *ragged(list(TEAMS[name]), 3))


@st.composite
def teams(draw):
    count = draw(st.integers(2, 4))
    agents = []
    for i in range(count):
        earlier = [a.name for a in agents]
        senders = draw(st.lists(st.sampled_from(earlier), unique=True, max_size=3)) if earlier else []
        if i == count - 1:
            senders += [n for n in earlier if n not in senders and not any(n in a.senders for a in agents)]
        bridges = [s for s in senders if draw(st.booleans())]
        agents.append(Agent(f"a{i}", tuple(senders), bridges=tuple(bridges), model=draw(st.sampled_from(list(MODELS)))))
    models = dict.fromkeys(agent.model for agent in agents)
    adapters = draw(st.sampled_from(["shared", "per_role"]))
    states = draw(st.sampled_from(BRIDGE_STATES))
    models = {name: {} for name in models}
    return Topology("random", tuple(agents), "", adapters=adapters, models=models, bridge_states=states)


@settings(max_examples=12)
@given(topology=teams(), data=st.data())
def test_random_teams(topology, data):
    rows, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    options = dict(latent_steps=steps, checkpointing=data.draw(st.sampled_from(["none", "all"])),
                   bridge=data.draw(st.sampled_from(["linear", "mlp"])), detach_trace=data.draw(st.booleans()),
                   alignment=data.draw(st.sampled_from(["identity", "learned"])))  # fmt: skip
    names = [agent.name for agent in topology.agents]
    check(system_on(topology, **options), *ragged(names, rows, seed=data.draw(st.integers(0, 9))))


def test_other_hand_overs_between_models_are_refused_with_the_reason():
    said = (
        r"handover is 'full' from agent sender to agent solver, and keys and values of model small mean nothing to "
        r"model large \(2 attention layers of 2 × 8 there, 3 attention layers of 1 × 8 here\); allowed: bridge"
    )
    with pytest.raises(UnsupportedModelError, match=said):
        system_on(topology_of("pair", handover="full"))
    with pytest.raises(UnsupportedModelError, match="handover is 'latent' from agent a to agent b"):
        system_on(topology_of("there and back", handover="latent"))
