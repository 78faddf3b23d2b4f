"""An adapter for each agent: it is part of the agent's calls, whoever runs them, and whenever they run again."""

import copy

import pytest
import torch
from compare import assert_same, error, gradients
from oracle import batch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from test_exactness import DAGS, TOLERANCE
from tiny_models import arguments, causal_lm, clone, ragged

from diffmas.agents.captured_rollouts import CapturedRollouts, Eager
from diffmas.agents.topology import Agent, Topology, TopologyError, load_topology
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.evaluation.answering import evaluating
from diffmas.generation import Decoding
from diffmas.models.errors import UnsupportedModelError
from diffmas.system import MultiAgentSystem

LORA = dict(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
#: One that two agents share, one of its own, none, and the last agent's.
NAMES = {
    "sequential": dict(planner="one", critic="two", refiner="one"),
    "hierarchical": dict(math="one", science="none", code="two"),
    "relay": dict(sender="one"),
    "diamond": dict(root="one", left="two", right="", join="none"),
}


def topology_of(name, handover):
    agents = (Agent(agent, senders, adapter=NAMES[name].get(agent, "")) for agent, senders in DAGS[name].items())
    return Topology(name, tuple(agents), handover)


def system_of(name="sequential", handover="full", family="qwen3", seed=1, **options):
    """With adapters that are not zero."""
    system = MultiAgentSystem(
        causal_lm(family), topology_of(name, handover), peft_config=LoraConfig(**LORA), latent_steps=2, **options
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in system.agent_model.model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return system


def oracle(system, name, handover, prompts, answers, detach=False):
    """Loss, logits and gradients by a model that PEFT switches, without gradients being turned on and off."""
    twin = clone(system.agent_model.model)
    last = list(DAGS[name])[-1]

    def turn(agent):
        chosen = {last: "default"}.get(agent, NAMES[name].get(agent) or "default")
        for module in twin.modules():
            if isinstance(module, BaseTunerLayer):
                module._active_adapter = [] if chosen == "none" else [chosen]

    twin.zero_grad()
    loss, logits = batch(
        twin, DAGS[name], prompts, answers, handover=handover, latent_steps=2, detach=detach, turn=turn
    )
    loss.backward()
    return loss.detach(), logits.detach(), gradients(twin)


def check(system, name, handover, detach=False):
    prompts, answers = ragged(list(DAGS[name]), 3)
    loss, logits, wanted = oracle(system, name, handover, prompts, answers, detach)
    output = system(*arguments(prompts, answers))
    output.loss.backward()
    assert error(output.loss.detach(), loss) <= TOLERANCE and error(output.logits.detach(), logits) <= TOLERANCE
    assert_same(gradients(system.agent_model.model), wanted, TOLERANCE)


@pytest.mark.parametrize("handover", ["full", "latent"])
@pytest.mark.parametrize("name", NAMES)
def test_every_call_runs_with_its_agent_s_adapter(name, handover):
    check(system_of(name, handover), name, handover)


@pytest.mark.parametrize(
    "options",
    [
        dict(checkpointing="prefill"), dict(checkpointing="all"), dict(latent_backward="sweeps:2", checkpointing="all"),
        dict(backend="reference", checkpointing="all"),
    ],
    ids=str,
)  # fmt: skip
def test_in_every_strategy(options):
    system = system_of(**options).train()
    for _ in range(2):
        system.zero_grad()
        check(system, "sequential", "full")


def test_captured():
    system = system_of()
    captured = CapturedRollouts(Eager, devices=("cpu",), bucket=4)
    system.trajectory.latent_rollout, system.trajectory.allocate = captured, captured.allocate
    for _ in range(2):
        system.zero_grad()
        check(system, "sequential", "full")
    assert captured.recordings > 0


def test_a_gradient_that_is_cut_reaches_the_last_agent_s_alone():
    system = system_of(detach_trace=True)
    check(system, "sequential", "full", detach=True)
    found = gradients(system.agent_model.model)
    assert {n.split(".")[-2] for n, g in found.items() if g.abs().sum() > 0} == {"default"}
    assert system.has_unreached_parameters and not system_of().has_unreached_parameters


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_answers(backend):
    """A row's greedy tokens have the log-probabilities that the oracle's logits say."""
    tokenizer = build_tokenizer()
    system = system_of(backend=backend).eval()
    prompts, answers = ragged(list(DAGS["sequential"]), 2)
    ids, lengths, *_ = arguments(prompts, answers)
    found = system.generate(ids, lengths, tokenizer, Decoding(max_new_tokens=4, temperature=0, samples=2))
    wanted = [torch.tensor(row[0].tokens) for row in found]
    _, logits, _ = oracle(system, "sequential", "full", prompts, wanted)
    chosen = logits.log_softmax(-1).gather(1, torch.cat(wanted)[:, None])[:, 0]
    said = [value for row in found for value in row[0].logprobs[: len(row[0].tokens)]]
    torch.testing.assert_close(torch.tensor(said, dtype=torch.float64), chosen, rtol=1e-5, atol=1e-5)


def test_copies_and_other_systems_on_the_model():
    """The one agent runs with what PEFT has active; a team on the same model, and a copy, with their own."""
    system = system_of()
    prompts, answers = ragged(list(DAGS["sequential"]), 2)
    logits = system(*arguments(prompts, answers)).logits
    single = MultiAgentSystem(system.agent_model.model, load_topology("single"))
    alone = ([prompts["solver"][0]], [[len(prompts["solver"][0])]], answers[0], [len(answers[0])])
    before = single(*alone).logits
    again = system(*arguments(prompts, answers)).logits
    assert torch.equal(logits, again) and torch.equal(single(*alone).logits, before)
    with system.agent_model.model.disable_adapter():
        bare = system(*arguments(prompts, answers)).logits
    assert error(bare, logits) > 1e-3 and torch.equal(system(*arguments(prompts, answers)).logits, logits)
    assert torch.equal(copy.deepcopy(system)(*arguments(prompts, answers)).logits, logits)


def test_per_role_and_what_trains():
    topology = load_topology("sequential", adapters="per_role")
    assert topology.adapter_names == ("default", "planner", "critic", "refiner")
    assert Topology.from_dict(topology.to_dict()) == topology
    options = {"one": {"train": False}}
    frozen = Topology.from_dict(topology_of("sequential", "full").to_dict() | {"adapters": options})
    assert frozen.trained_on("default") == ("default", "two") and Topology.from_dict(frozen.to_dict()) == frozen
    system = MultiAgentSystem(causal_lm("qwen3"), frozen, peft_config=LoraConfig(**LORA), latent_steps=1)
    trained = {n.split(".")[-2] for n, p in system.named_parameters() if p.requires_grad}
    assert trained == {"default", "two"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(adapters="each"), "adapters is 'each'; allowed: shared, per_role, or a mapping"),
        (dict(adapters={"three": {}}), r"adapters has \['three'\], which no agent runs with; allowed: default, one"),
        (dict(adapters={"one": {"rank": 4}}), r"adapter one has unknown keys \['rank'\]; allowed: path, train"),
        (dict(adapters={"one": {"train": "no"}}), "train of adapter one is 'no'; allowed: true or false"),
        (dict(agents=[{"name": "a", "adapter": "a b"}]), "adapter of agent a is 'a b'; allowed: letters"),
        (dict(agents=[{"name": "a", "adapter": "own"}]), "adapter of agent a is 'own'; allowed: default or none"),
    ],
)
def test_bad_adapters(change, message):
    with pytest.raises(TopologyError, match=message):
        Topology.from_dict(topology_of("sequential", "full").to_dict() | change)


def test_a_model_without_the_adapter():
    with pytest.raises(ValueError, match=r"adapter is 'one', and the model has \[\]; allowed"):
        MultiAgentSystem(causal_lm("qwen3"), topology_of("relay", "full"))


def relay(name="one", last="", **options):
    agents = (Agent("sender", (), adapter=name), Agent("solver", ("sender",), adapter=last))
    topology = Topology("relay", agents, **{k: options.pop(k) for k in ("adapters", "adapter_options") if k in options})
    return MultiAgentSystem(causal_lm("qwen3"), topology, peft_config=LoraConfig(**LORA), latent_steps=2, **options)


def trained(system):
    return {n.split(".")[-2] for n, p in system.named_parameters() if p.requires_grad}


def test_what_peft_was_told_is_given_back():
    """After a call and its recomputation, PEFT works on what it was told, and an evaluation freezes nothing."""
    system = relay(checkpointing="all").train()
    model, (prompts, answers) = system.agent_model.model, ragged(["sender", "solver"], 2)
    with evaluating(system, adapter=False):
        system(*arguments(prompts, answers))
    assert trained(system) == {"default", "one"}
    system(*arguments(prompts, answers)).loss.backward()
    assert {tuple(m.active_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)} == {("default",)}
    with model.disable_adapter():
        pass
    system.choose_trained()
    assert trained(system) == {"default", "one"}
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match=r"adapters \['default'\] are merged into the model"):
        system(*arguments(prompts, answers))
    model.unmerge_adapter()
    model.delete_adapter("one")
    with pytest.raises(ValueError, match="adapter 'one' is no longer on the model; allowed: default, none"):
        system(*arguments(prompts, answers))


def test_an_adapter_on_more_layers_that_comes_later():
    system = relay()
    model = system.agent_model.model
    model.add_adapter("two", LoraConfig(**LORA | {"target_modules": ["q_proj", "lm_head"]}))
    agents = (Agent("sender", (), adapter="two"), Agent("solver", ("sender",), adapter="two2"))
    with pytest.raises(TopologyError):
        Topology("relay", agents)
    other = MultiAgentSystem(model, Topology("relay", (agents[0], Agent("solver", ("sender",)))), latent_steps=2)
    prompts, answers = ragged(["sender", "solver"], 2)
    other(*arguments(prompts, answers)).loss.backward()
    reached = {n for n, p in model.named_parameters() if ".two." in n and p.grad is not None}
    assert reached == {n for n, _ in model.named_parameters() if ".two." in n and "lm_head" not in n}


@pytest.mark.parametrize("name", ["mlp", "layers", "q_proj", "lora_A", "ora", "items", "train", "weight"])
def test_names_by_which_peft_tells_weights_apart(name):
    with pytest.raises(ValueError, match=f"adapter '{name}' is called like a part of the model; allowed: another name"):
        relay(name)


@pytest.mark.parametrize("role", ["none", "default"])
def test_roles_that_say_something_else(role):
    agents = (Agent("sender", (), role), Agent("solver", ("sender",)))
    with pytest.raises(TopologyError, match=f"role of agent sender is '{role}', which cannot name its adapter"):
        Topology("relay", agents, adapters="per_role")


def test_a_folder_that_an_adapter_starts_from(tmp_path):
    system = relay()
    system.agent_model.model.save_pretrained(tmp_path / "kept", selected_adapters=["one"])
    folder = tmp_path / "kept" / "one"
    wanted = {n: torch.randn_like(t) for n, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(wanted, folder / "adapter_model.safetensors")
    options = {"one": {"path": str(folder), "train": False}}
    found = relay(adapter_options=options)
    parameters = {n: p for n, p in found.agent_model.model.named_parameters() if ".one." in n}
    assert len(parameters) == len(wanted) and trained(found) == {"default"}
    assert all(torch.equal(p.detach(), wanted[n.replace(".one", "")]) for n, p in parameters.items())
    save_file({n.replace("layers", "blocks"): t for n, t in wanted.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lacks .* weights of adapter 'one', such as .*; allowed: "):
        relay(adapter_options=options)
    # A mode beside the mapping leaves what it says alone.
    data = found.topology.to_dict()
    assert Topology.from_dict(data, adapters="per_role").adapter_options == options
    both = Topology("relay", found.topology.agents, adapters="per_role", adapter_options=options)
    assert Topology.from_dict(both.to_dict()) == both


@pytest.mark.parametrize(
    ("build", "reached"),
    [
        (lambda: relay(), True),
        (lambda: relay(detach_trace=True), False),
        (lambda: relay(last="none"), True),
        (lambda: relay("none", last="default"), True),
        (lambda: relay(adapter_options={"default": {"train": False}}, detach_trace=True), False),
    ],
)
def test_which_parameters_a_gradient_reaches(build, reached):
    assert build().has_unreached_parameters != reached


def test_a_training_of_nothing():
    with pytest.raises(ValueError, match="no weight trains; allowed: an adapter that does"):
        relay("none", "none").check_trains()
    with pytest.raises(ValueError, match="detach_trace is True, and agent solver, the only one .*, has no adapter"):
        relay(last="none", detach_trace=True).check_trains()
    relay().check_trains()
