"""An adapter for each agent: it is part of the agent's calls, whoever runs them, and whenever they run again."""

import copy

import pytest
import torch
from compare import assert_same, error, gradients
from oracle import batch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from test_exactness import DAGS, TOLERANCE
from tiny_models import arguments, causal_lm, clone, ragged

from diffmas.agents.captured_rollouts import CapturedRollouts, Eager
from diffmas.agents.topology import Agent, Topology, TopologyError, load_topology
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.generation import Decoding
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
    assert frozen.trained_adapters == ("default", "two") and Topology.from_dict(frozen.to_dict()) == frozen
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
