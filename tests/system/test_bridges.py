"""Hand-overs of hidden states: loss, logits and every gradient are those of each row alone, bridges written out."""

import pytest
import torch
from bridge_oracle import batch
from compare import assert_same, error, gradients
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import arguments, causal_lm, clone, packed, ragged, with_lora

from diffmas.agents.bridges import shared_tokens
from diffmas.agents.controls import CONTROLS
from diffmas.agents.topology import BRIDGE_STATES, Agent, Topology, TopologyError
from diffmas.comparison.axes import first_agents
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.evaluation.inspection import inspect
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem
from diffmas.training.memory import plan_of

TOLERANCE = 1e-10
STEPS = 3
#: Agents and their senders; by agent, the senders whose hidden states it reads; the hand-over of the other senders.
TEAMS = {
    "relay": ({"sender": (), "solver": ("sender",)}, {"solver": ("sender",)}, "full"),
    "chain": (
        {"a": (), "b": ("a",), "c": ("b",), "d": ("c",)},
        {"b": ("a",), "c": ("b",), "d": ("c",)},
        "full",
    ),
    "experts": ({"a": (), "b": (), "c": (), "end": ("c", "a", "b")}, {"end": ("c", "a", "b")}, "full"),
    # A trace goes on behind a bridge, and a bridge into a trace that goes on.
    "mixed": (
        {"a": (), "b": ("a",), "c": ("b", "a"), "d": ("c",)},
        {"b": ("a",), "c": ("a",)},
        "full",
    ),
    # Merged and moved columns beside a bridge, one sender handing over both ways.
    "latent": (
        {"root": (), "left": ("root",), "right": ("root",), "join": ("left", "right"), "end": ("join", "root")},
        {"right": ("root",), "join": ("left",), "end": ("root",)},
        "latent",
    ),
}
pytestmark = pytest.mark.usefixtures("poison")


def topology_of(name, **options):
    dag, bridged, handover = TEAMS[name]
    agents = tuple(Agent(agent, senders, bridges=bridged.get(agent, ())) for agent, senders in dag.items())
    return Topology(name, agents, handover, **options)


def randomised(module, seed, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def system_of(name, *, adapters="shared", tied=False, bridge_states="latent", **options):
    topology = topology_of(name, adapters=adapters, bridge_states=bridge_states)
    model = clone(with_lora(causal_lm("qwen3", tied=tied), adapters=topology.adapter_names[1:])).train()
    system = MultiAgentSystem(model, topology, **dict(latent_steps=STEPS) | options)
    randomised(system.bridges, 5)
    if system.agent_model.alignment.options.trains:
        noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        system.agent_model.alignment.weight.data.add_(0.2 * noise)
    system.choose_trained()
    return system


def expected(system, name, prompts, answers):
    """Loss, logits, and gradients by the system's own names."""
    dag, bridged, handover = TEAMS[name]
    twin = clone(system.agent_model.model)
    twin.zero_grad()
    edges = {edge: dict(system.bridges[edge].named_parameters()) for edge in system.topology.bridge_edges}
    weights = {e: {n: p.detach().clone().requires_grad_() for n, p in w.items()} for e, w in edges.items()}
    weight = system.agent_model.alignment.weight
    project = None if weight is None else weight.detach().clone().requires_grad_()

    def turn(agent):
        chosen = system.topology.adapter_of(next(a for a in system.topology.agents if a.name == agent))
        for module in twin.modules():
            if isinstance(module, BaseTunerLayer):
                module._active_adapter = [chosen]

    loss, logits = batch(
        dict.fromkeys(dag, twin), dag, bridged, prompts, answers, weights=weights, handover=handover,
        latent_steps=system.latent_steps, detach=system.trajectory.detach_trace, project={id(twin): project}, turn=turn,
        bridge_states=system.topology.bridge_states,
    )  # fmt: skip
    loss.backward()
    found = {f"agent_model.model.{n}": g for n, g in gradients(twin).items()}
    found |= {f"{e}.{n}": p.grad for e, w in weights.items() for n, p in w.items() if p.grad is not None}
    if system.agent_model.alignment.options.trains and project.grad is not None:
        found["agent_model.alignment.weight"] = project.grad
    return loss.detach(), logits.detach(), found


def actual(system):
    found = {n: g for n, g in gradients(system).items() if not n.startswith("bridges.")}
    edges = system.topology.bridge_edges
    return found | {f"{e}.{n}": g for e in edges for n, g in gradients(system.bridges[e]).items()}


def check(system, name, rows=3):
    prompts, answers = ragged(list(TEAMS[name][0]), rows)
    loss, logits, wanted = expected(system, name, prompts, answers)
    output = system(*arguments(prompts, answers))
    output.loss.backward()
    assert error(output.loss, loss) <= TOLERANCE and error(output.logits, logits) <= TOLERANCE
    found = actual(system)
    assert_same(found, wanted, TOLERANCE)
    return found


@pytest.mark.parametrize(
    "name, bridge_states, checkpointing, rows",
    [
        *((name, "latent", *mode) for name in TEAMS for mode in (("none", 1), ("prefill", 1), ("none", 7), ("all", 7))),
        *((name, "full", *mode) for name in ("experts", "mixed", "latent") for mode in (("none", 1), ("all", 7))),
    ],
)
def test_exactness(name, bridge_states, checkpointing, rows):
    system = system_of(name, checkpointing=checkpointing, alignment="learned", bridge_states=bridge_states)
    found = check(system, name, rows)
    # Nothing is left out: every bridge, both halves of every adapter, the alignment.
    edges = topology_of(name).bridge_edges
    assert all(found[f"{edge}.linear.{part}"].abs().sum() > 0 for edge in edges for part in ("weight", "bias"))
    assert found["agent_model.alignment.weight"].abs().sum() > 0
    assert sum("lora_" in n for n in found) == 2 * 7 * 2


OPTIONS = [
    dict(bridge="mlp"), dict(backend="reference"), dict(latent_steps=1), dict(detach_trace=True),
    dict(latent_backward="sweeps:3", checkpointing="all"), dict(alignment="ridge"),
    dict(adapters="per_role", checkpointing="all"), dict(tied=True, bridge_initial="random"),
    dict(bridge_states="full", latent_backward="sweeps:3"), dict(bridge_states="full", detach_trace=True),
    dict(bridge_states="full", latent_steps=0), dict(latent_steps=0),
]  # fmt: skip


#: Each with two of the teams.
@pytest.mark.parametrize(
    "name, options", [([*TEAMS][(i + j) % len(TEAMS)], options) for i, options in enumerate(OPTIONS) for j in (0, 2)]
)
def test_options(name, options):
    system = system_of(name, **options)
    check(system, name)
    if system.trajectory.detach_trace:
        reached = {e for e in system.topology.bridge_edges if gradients(system.bridges[e])}
        assert reached == {(s, r) for s, r in system.topology.bridge_edges if r == system.topology.last.name}


def test_fewer_sweeps_are_not_exact():
    """The sweeps see what reaches the hidden states: one less than it takes, and the gradient is another."""
    found = []
    for backward in ("exact", "sweeps:1", "sweeps:2", "sweeps:3"):
        system = system_of("relay", latent_backward=backward)
        system(*arguments(*ragged(["sender", "solver"], 3))).loss.backward()
        found.append(torch.cat([g.flatten() for n, g in gradients(system.agent_model.model).items() if "lora" in n]))
    off = [error(g, found[0]) for g in found[1:]]
    assert off[0] > 1e-3 and off[1] > 1e-6 and off[2] < TOLERANCE


def test_checkpointing_changes_no_bit():
    found = []
    for checkpointing in ("none", "all"):
        system = system_of("mixed", adapters="per_role", checkpointing=checkpointing)
        system(*arguments(*ragged(list("abcd"), 3))).loss.backward()
        found.append(gradients(system))
    assert found[0].keys() == found[1].keys() and all(torch.equal(g, found[1][n]) for n, g in found[0].items())


def test_accumulated_over_micro_batches():
    prompts, answers = ragged(["sender", "solver"], 4)
    whole, parts = system_of("relay"), system_of("relay")
    whole(*arguments(prompts, answers)).loss.backward()
    count = sum(map(len, answers))
    for rows in (slice(0, 1), slice(1, 4)):
        some = arguments({n: p[rows] for n, p in prompts.items()}, answers[rows])
        parts(*some, num_items_in_batch=count).loss.backward()
    assert_same(gradients(parts), gradients(whole), TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
def test_a_bridge_starts_at_the_least_squares_map(tied):
    """From a token's row of the head to the same token's embedding, as well as a linear map can."""
    model = causal_lm("qwen3", tied=tied)
    system = MultiAgentSystem(model, topology_of("relay"), latent_steps=1)
    bridge = system.bridges["sender", "solver"]
    w_in, w_out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    best = torch.linalg.lstsq(w_out.detach(), w_in.detach()).solution
    assert error(bridge.linear.weight.T, best) < 1e-4
    rho = w_in.norm(dim=1).mean()
    assert error(bridge(w_out).norm(dim=1), rho.expand(len(w_in))) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(("name", "bridge_states"), [("relay", "latent"), ("latent", "latent"), ("relay", "full")])
def test_controls_act_on_the_states(name, bridge_states, control):
    """The last agent's first token comes from what the control makes of states and columns alike."""
    tokenizer = build_tokenizer()
    system, seen = system_of(name, bridge_states=bridge_states).eval(), []
    prompts, _ = ragged(list(TEAMS[name][0]), 3)
    sender = "sender" if name == "relay" else "root"
    ids, lengths, *_ = arguments(prompts, prompts[sender])

    def watched(handed, seeds):
        ((before,), after) = handed.states, CONTROLS[control]
        before = [row.clone() for row in before.rows()]
        (after,) = (handed := after(handed, seeds)).states
        seen.append((before, after.rows()))
        return handed

    found = system.generate(ids, lengths, tokenizer, Decoding(max_new_tokens=2, temperature=0), control=watched)
    ((before, after),) = seen
    own = [STEPS + (len(p) if bridge_states == "full" else 1) for p in prompts[sender]]
    assert [len(row) for row in before] == own
    wanted = {"matched": before, "mismatched": [before[i] for i in (1, 2, 0)], "zero": [0 * row for row in before]}
    if control == "noise":
        before, after = torch.cat(before), torch.cat(after)
        assert error(after.norm(dim=-1), before.norm(dim=-1)) < 1e-6 and error(after, before) > 0.5
    else:
        assert len(after) == 3 and all(torch.equal(*rows) for rows in zip(after, wanted[control], strict=True))
    plain = system.generate(ids, lengths, tokenizer, Decoding(max_new_tokens=2, temperature=0))
    said = [[row[0].logprobs for row in rows] for rows in (found, plain)]
    assert (said[0] == said[1]) == (control == "matched")


@torch.no_grad()
@pytest.mark.parametrize("bridge_states", BRIDGE_STATES)
@pytest.mark.parametrize("name", ["relay", "mixed"])
def test_answers(name, bridge_states):
    """A row's greedy tokens have the log-probabilities that the oracle's logits say, alone and in a batch."""
    tokenizer = build_tokenizer()
    system = system_of(name, bridge_states=bridge_states).eval()
    prompts, answers = ragged(list(TEAMS[name][0]), 3)
    ids, lengths, *_ = arguments(prompts, answers)
    found = system.generate(ids, lengths, tokenizer, Decoding(max_new_tokens=4, temperature=0, samples=2))
    tokens = [torch.tensor(row[0].tokens) for row in found]
    with torch.enable_grad():
        _, logits, _ = expected(system, name, prompts, tokens)
    chosen = logits.log_softmax(-1).gather(1, torch.cat(tokens)[:, None])[:, 0]
    said = [value for row in found for value in row[0].logprobs[: len(row[0].tokens)]]
    torch.testing.assert_close(torch.tensor(said, dtype=torch.float64), chosen, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bridge_states", BRIDGE_STATES)
@pytest.mark.parametrize("name", TEAMS)
def test_the_plan_counts_what_is_read(name, bridge_states):
    system = system_of(name, bridge_states=bridge_states)
    prompts, answers = ragged(list(TEAMS[name][0]), 3)
    ids, lengths, answer_ids, answer_lengths = arguments(prompts, answers)
    opened = []

    def watched(call, latent):
        opened.append((latent, call.lengths, call.host_ends))

    with system.agent_model.observed(watched):
        system(ids, lengths, answer_ids, answer_lengths)
    plan = plan_of(system, lengths, answer_lengths)
    # A call of the plan is all latent steps of an agent.
    expected = [c for call in plan.calls for c in [call] * call.steps]
    assert [latent for latent, *_ in opened] == [call.phase == "latent" for call in expected]
    read = [(n, ends) for latent, n, ends in opened if not latent]
    planned = [call.rows for call in plan.calls if call.phase != "latent"]
    assert [[(e - n, n) for n, e in zip(*call, strict=True)] for call in read] == [list(rows) for rows in planned]
    assert len(plan.columns) == len(plan.models) and set(plan.models) == {"default"}


@pytest.mark.parametrize("bridge_states", BRIDGE_STATES)
@pytest.mark.parametrize("name", ["relay", "mixed"])
def test_inspection_shows_what_came_over_a_bridge(name, bridge_states):
    system = system_of(name, bridge_states=bridge_states).eval()
    prompts, _ = ragged(list(TEAMS[name][0]), 1)
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    found = inspect(system, ids, lengths, [3, 4])
    assert abs(sum(part.mass for part in found.parts) - 1) < 1e-6 and all(part.mass > 0 for part in found.parts)
    assert [(p.agent, p.columns) for p in found.parts if p.kind == "hidden states"] == {
        "relay": [("sender", STEPS + (lengths[0][0] if bridge_states == "full" else 1))],
        "mixed": [],
    }[name]
    writers = [agent.name for agent in system.topology.agents[:-1] for _ in range(STEPS)]
    assert [step.agent for step in found.steps] == writers
    # What the sender's model would have said in place of its first latent step.
    first = next(iter(prompts))
    logits = clone(system.agent_model.model)(input_ids=prompts[first][0][None]).logits[0, -1]
    assert found.steps[0].said[0][0] == int(logits.argmax())


def test_agents_left_out_leave_their_bridges():
    shape = first_agents(topology_of("mixed"), 3)
    agents = {agent.name: agent for agent in shape.agents}
    # c, left out, had a over a bridge and b in its trace.
    assert set(agents["d"].senders) == {"a", "b"} and shape.bridged(agents["d"]) == ("a",)
    assert shape.bridged(agents["b"]) == ("a",)


@pytest.mark.parametrize(
    ("build", "raised", "message"),
    [
        (
            lambda: system_of("relay", bridge_states="all"),
            TopologyError,
            "bridge_states is 'all'; allowed: latent, full",
        ),
        (lambda: system_of("relay", bridge="deep"), ValueError, "bridge is 'deep'; allowed: linear, mlp"),
        (
            lambda: system_of("relay", bridge_initial="ones"),
            ValueError,
            "bridge_initial is 'ones'; allowed: tokens, random",
        ),
        (
            lambda: system_of("relay", cuda_graphs="auto"),
            ValueError,
            "cuda_graphs is 'auto', and agents hand over hidden",
        ),
        (
            lambda: Topology("t", (Agent("a"), Agent("b", ("a",), bridges=("c",)))),
            TopologyError,
            r"bridges of agent b has \['c'\]; allowed: a",
        ),
        (
            lambda: Topology.from_dict({"agents": [{"name": "a", "bridges": "b"}]}),
            TopologyError,
            "bridges of agent a is 'b'; allowed: a list of names",
        ),
    ],
)
def test_bad_input(build, raised, message):
    with pytest.raises(raised, match=message):
        build()


def test_tokens_that_a_model_has_no_embedding_of_start_no_bridge():
    """Added to the tokenizer, and the model was not resized."""

    class Vocabulary(dict):
        def get_vocab(self):
            return self

    sender, receiver = Vocabulary({"a": 0, "▁b": 1, "new": 40}), Vocabulary({"new": 2, "Ġb": 3, "a": 50})
    there, here = shared_tokens(("x", sender, 41), ("y", receiver, 4))
    assert (there.tolist(), here.tolist()) == ([40, 1], [2, 3])
    with pytest.raises(ValueError, match="models x and y have no token in common; allowed: random"):
        shared_tokens(("x", sender, 1), ("y", receiver, 4))
