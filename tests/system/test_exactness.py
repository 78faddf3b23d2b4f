"""The exactness contract: loss, logits and gradients are those of every row alone with plain `torch.cat` caches."""

from functools import cache
from itertools import product

import pytest
import torch
from compare import assert_same, error, gradients
from oracle import DEFAULT_LIMIT, Soft, batch
from tiny_models import arguments, causal_lm, clone, ragged, with_lora

from diffmas.agents.topology import Agent, Topology
from diffmas.system import MultiAgentSystem

TOLERANCE = 1e-10
DAGS = {
    "sequential": {"planner": (), "critic": ("planner",), "refiner": ("critic",), "solver": ("refiner",)},
    "hierarchical": {"math": (), "science": (), "code": (), "summarizer": ("math", "science", "code")},
    "stitch": {"a": (), "b": (), "solver": ("a", "b")},
    "relay": {"sender": (), "solver": ("sender",)},
    # Fan-out, a path that skips an agent, and an agent behind the join.
    "diamond": {"root": (), "left": ("root",), "right": ("root",), "join": ("right", "left", "root"), "end": ("join",)},
}
pytestmark = pytest.mark.usefixtures("poison")


@cache
def lora_model(family="qwen3", tied=False, **overrides):
    return with_lora(causal_lm(family, tied=tied, **overrides))


def alignment_weight(size=16):
    generator = torch.Generator().manual_seed(2)
    return torch.eye(size, dtype=torch.float64) + 0.2 * torch.randn(size, size, generator=generator).double()


@cache
def expected(family, tied, topology, handover, latent_steps, detach, rows, longest):
    model = clone(lora_model(family, tied))
    model.zero_grad()
    weight = alignment_weight().requires_grad_()
    prompts, answers = ragged(list(DAGS[topology]), rows, longest=longest)
    options = dict(handover=handover, latent_steps=latent_steps, detach=detach, weight=weight)
    loss, logits = batch(model, DAGS[topology], prompts, answers, **options)
    loss.backward()
    return loss.detach(), logits.detach(), gradients(model) | {"weight": weight.grad}


def check(family, tied, topology, handover, latent_steps, detach, checkpointing, backend, rows=3, longest=11):
    dag = DAGS[topology]
    model = clone(lora_model(family, tied)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    system = MultiAgentSystem(
        model,
        Topology(topology, tuple(Agent(*item) for item in dag.items()), handover),
        latent_steps=latent_steps,
        alignment="learned",
        detach_trace=detach,
        backend=backend,
    )
    system.agent_model.alignment.weight.data.copy_(alignment_weight())
    prompts, answers = ragged(list(dag), rows, longest=longest)
    output = system(*arguments(prompts, answers))
    output.loss.backward()

    loss, logits, grads = expected(family, tied, topology, handover, latent_steps, detach, rows, longest)
    assert error(output.loss, loss) <= TOLERANCE
    assert error(output.logits, logits) <= TOLERANCE
    if grads["weight"] is None:
        grads = {n: g for n, g in grads.items() if n != "weight"}
    actual = gradients(model)
    assert sum("lora_" in name for name in actual) == 2 * 7 * 2
    if (weight := system.agent_model.alignment.weight.grad) is not None:
        actual["weight"] = weight
    assert_same(actual, grads, TOLERANCE)
    reached = not detach and latent_steps
    assert bool(reached) == ("weight" in grads and bool(grads["weight"].any()))


@pytest.mark.parametrize(
    "backend, checkpointing", [("auto", False), ("auto", True), ("reference", False)],
    ids=["auto", "auto-checkpointing", "reference"],
)  # fmt: skip
@pytest.mark.parametrize("detach", [False, True], ids=["", "detach"])
@pytest.mark.parametrize("latent_steps", [0, 1, 4])
@pytest.mark.parametrize("handover", ["full", "latent"])
@pytest.mark.parametrize("topology", DAGS)
def test_product(topology, handover, latent_steps, detach, checkpointing, backend):
    check("qwen3", False, topology, handover, latent_steps, detach, checkpointing, backend)


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3"])
@pytest.mark.parametrize(
    "tied, topology, handover, latent_steps, detach, checkpointing",
    [
        (True, "sequential", "full", 5, False, True),
        (True, "diamond", "latent", 3, False, False),
        (False, "hierarchical", "full", 2, False, True),
        (False, "diamond", "full", 1, True, True),
        (False, "sequential", "latent", 0, False, False),
    ],
)
def test_families(family, tied, topology, handover, latent_steps, detach, checkpointing, backend):
    check(family, tied, topology, handover, latent_steps, detach, checkpointing, backend, rows=4, longest=23)


STRATEGIES = [{}, dict(checkpointing="all"), dict(latent_backward="sweeps:4")]


@cache
def expected_with_sink(topology, sink, latent_steps, detach):
    model = clone(lora_model())
    model.zero_grad()
    prompts, answers = longer(topology)
    options = dict(handover="latent", latent_steps=latent_steps, detach=detach, sink=sink)
    loss, logits = batch(model, DAGS[topology], prompts, answers, **options)
    loss.backward()
    return loss.detach(), logits.detach(), gradients(model)


def longer(topology):
    """Ragged prompts that begin alike and are longer than any sink."""
    prompts, answers = ragged(list(DAGS[topology]), 3)
    return {n: [torch.cat((torch.tensor([5, 7]), p)) for p in rows] for n, rows in prompts.items()}, answers


@pytest.mark.parametrize("options", STRATEGIES, ids=str)
@pytest.mark.parametrize("sink, detach, latent_steps", [(1, False, 3), (3, False, 0), (3, True, 3)])
@pytest.mark.parametrize("topology", DAGS)
def test_a_sink_in_front_of_a_latent_hand_over(topology, sink, latent_steps, detach, options):
    model = clone(lora_model()).train()
    shape = Topology(topology, tuple(Agent(*item) for item in DAGS[topology].items()), "latent", sink)
    system = MultiAgentSystem(model, shape, latent_steps=latent_steps, detach_trace=detach, **options)
    output = system(*arguments(*longer(topology)))
    output.loss.backward()
    loss, logits, grads = expected_with_sink(topology, sink, latent_steps, detach)
    assert error(output.loss, loss) <= TOLERANCE and error(output.logits, logits) <= TOLERANCE
    assert_same(gradients(model), grads, TOLERANCE)


@cache
def expected_soft(tied, topology, handover, soft):
    model = clone(lora_model("qwen3", tied))
    model.zero_grad()
    soft = soft._replace(temperature=torch.tensor([soft.temperature], dtype=torch.float64).requires_grad_())
    prompts, answers = ragged(list(DAGS[topology]), 3)
    loss, logits = batch(model, DAGS[topology], prompts, answers, handover=handover, latent_steps=4, soft=soft)
    loss.backward()
    return loss.detach(), logits.detach(), gradients(model), soft.temperature.grad


SOFT = [
    (Soft(), False),
    (Soft(), True),
    (Soft(1.3, top_k=5), False),
    (Soft(0.4, limit=0.8), True),
    (Soft(0.3, limit=DEFAULT_LIMIT), False),
]
#: Every pair of a team's hand-over and an alignment in one of the strategies, so that these meet each of both.
SOFT_CASES = [
    (topology, handover, *soft, STRATEGIES[(i + j) % 3])
    for i, (topology, handover) in enumerate(product(DAGS, ("full", "latent")))
    for j, soft in enumerate(SOFT)
]


@pytest.mark.parametrize("topology, handover, soft, tied, options", SOFT_CASES)
def test_soft_alignment(topology, handover, soft, tied, options):
    dag = DAGS[topology]
    model = clone(lora_model("qwen3", tied)).train()
    shape = Topology(topology, tuple(Agent(*item) for item in dag.items()), handover)
    soft_options = dict(soft.options(), alignment_temperature_learned=True)
    system = MultiAgentSystem(model, shape, latent_steps=4, **soft_options, **options)
    output = system(*arguments(*ragged(list(dag), 3)))
    output.loss.backward()
    loss, logits, grads, of_temperature = expected_soft(tied, topology, handover, soft)
    assert error(output.loss, loss) <= TOLERANCE and error(output.logits, logits) <= TOLERANCE
    assert_same(gradients(model), grads, TOLERANCE)
    # It is learned by its logarithm.
    assert error(system.agent_model.alignment.log_factor.grad, of_temperature * soft.temperature) <= TOLERANCE


@pytest.mark.parametrize("temperature, limit", [(0.4, 0.8), (0.3, DEFAULT_LIMIT)])
def test_the_clip_changes_gradients_and_nothing_else(temperature, limit):
    softs = Soft(temperature), Soft(temperature, limit=limit)
    free, held = (expected_soft(False, "sequential", "full", soft) for soft in softs)
    assert torch.equal(free[1], held[1])
    assert max(error(held[2][name], grad) for name, grad in free[2].items()) > 0.01
