"""Topologies: order, ancestors, who goes on in whose trace, files, and what is refused."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffmas.agents.topology import HANDOVERS, TOPOLOGIES, Agent, Topology, TopologyError, alone, load_topology


def of(handover="full", **senders):
    return Topology("custom", tuple(Agent(n, tuple(s)) for n, s in senders.items()), handover)


def test_agents_are_sorted_and_the_last_one_is_found():
    topology = of(c="ba", b="a", a="")
    assert [a.name for a in topology.agents] == ["a", "b", "c"]
    assert topology.last.name == "c"


def test_ancestors_are_transitive_unique_and_in_topological_order():
    topology = of(root="", l=["root"], r=["root"], join=["r", "l"], end=["join"])
    assert topology.ancestors("root") == ()
    assert topology.ancestors("join") == ("root", "l", "r")
    assert topology.ancestors("end") == ("root", "l", "r", "join")


def test_only_a_full_hand_over_between_two_agents_goes_on_in_the_same_trace():
    continues = {a.name: TOPOLOGIES["sequential"].continues(a) for a in TOPOLOGIES["sequential"].agents}
    assert continues == {"planner": None, "critic": "planner", "refiner": "critic", "solver": "refiner"}
    assert all(load_topology("sequential", "latent").continues(a) is None for a in TOPOLOGIES["sequential"].agents)
    fan_out = of(root="", l=["root"], r=["root"], join=["l", "r"])
    assert all(fan_out.continues(a) is None for a in fan_out.agents)


def test_role_defaults_to_the_name():
    assert Agent("a").role == "a" and Agent("a", role="critic").role == "critic"


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("handover", [None, *HANDOVERS])
@pytest.mark.parametrize("sink", [None, 2, "auto"])
def test_yaml_round_trip(name, handover, sink, tmp_path):
    topology = load_topology(name, handover, sink)
    assert topology.handover_sink == (sink or 0)
    assert topology.handover == (handover or TOPOLOGIES[name].handover)
    path = tmp_path / "topology.yaml"
    path.write_text(yaml.safe_dump(topology.to_dict()))
    assert load_topology(str(path)) == topology


def test_yaml_round_trip_of_what_is_said_of_models_and_bridges(tmp_path):
    agents = [{"name": "a", "model": "small"}, {"name": "b", "model": "small", "receives": ["a"]}]
    agents.append({"name": "c", "receives": ["b"], "bridges": ["b"]})
    said = dict(agents=agents, models={"small": {"dtype": "float32"}}, handover="latent", bridge_states="full")
    topology = Topology.from_dict(said | {"handover_sink": {"small": 2, "default": 1}})
    a, b, c = topology.agents
    assert [topology.sink_of(agent) for agent in (a, b, c)] == [2, 2, 1]
    assert topology.states_of("b", {"b": [3, 1]}, 4) == [7, 5]
    assert topology.states_read(c, {"b": [3, 1], "c": [9, 9]}, 4) == [7, 5]
    assert topology.states_read(b, {"b": [3, 1]}, 4) == [0, 0]
    path = tmp_path / "topology.yaml"
    path.write_text(yaml.safe_dump(topology.to_dict()))
    assert load_topology(str(path)) == topology
    assert load_topology(str(path), bridge_states="latent").states_of("b", {"b": [3, 1]}, 4) == [5, 5]


def sink(*given):
    topology = load_topology(*given)
    return topology.sink_of(topology.last)


def test_a_sink_is_that_of_the_first_agent_and_only_where_prompts_stay_behind():
    fan_in = of("latent", a="", b="", c="ab", d="b", e="dc")
    assert fan_in.leading == ("a", "b")
    assert sink("relay", "latent", "3") == 3
    assert sink("relay", "full", 3) == 0


@st.composite
def shuffled_dags(draw):
    names = [f"agent{i}" for i in range(draw(st.integers(1, 7)))]
    senders = {n: draw(st.sets(st.sampled_from(names[:i]), max_size=3)) if i else set() for i, n in enumerate(names)}
    unread = [n for n in names[:-1] if not any(n in s for s in senders.values())]
    senders[names[-1]] |= set(unread)
    agents = [Agent(n, tuple(sorted(s))) for n, s in senders.items()]
    return Topology("random", tuple(draw(st.permutations(agents))))


@given(shuffled_dags())
def test_every_dag_is_sorted(topology):
    seen = set()
    for agent in topology.agents:
        assert seen.issuperset(agent.senders)
        reach = {x for s in agent.senders for x in (*topology.ancestors(s), s)}
        assert set(topology.ancestors(agent.name)) == reach
        seen.add(agent.name)
    assert set(topology.ancestors(topology.last.name)) == seen - {topology.last.name}


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: of(), "agents is empty"),
        (lambda: of(a="b", b="a"), "cycle"),
        (lambda: of(a="", b="ab"), "b receive from each other in a cycle"),
        (lambda: of(a="", b="ax"), r"agent b receives from unknown \['x'\]; allowed: a, b"),
        (lambda: of(a="", b="aa"), "agent b receives from the same agent twice"),
        (lambda: Topology("t", (Agent("a"), Agent("a"))), r"agent names \['a'\] appear more than once"),
        (lambda: of(a="", b="", c="a"), r"nobody receives from are \['b', 'c'\].*exactly one"),
        (lambda: of("half", a=""), "handover is 'half'; allowed: full, latent"),
        (lambda: load_topology("relay", None, "-1"), "handover_sink is '-1'; allowed: integers ≥ 0, auto, or"),
        (lambda: Topology("t", (Agent("a"),), "latent", {"small": 1}), r"handover_sink has \['small'\], which no"),
        (lambda: Topology("t", (Agent("a"),), "latent", {"default": -1}), "handover_sink is {'default': -1}; allowed"),
        (lambda: load_topology("relay", bridge_states="some"), "bridge_states is 'some'; allowed: latent, full"),
        (lambda: load_topology("relay", None, 1.5), "handover_sink is 1.5"),
        (lambda: Topology.from_dict({"agents": [{"name": "a"}], "handover_sink": True}), "handover_sink is True"),
        (lambda: sink("relay", None, "auto"), "handover_sink is 'auto'; allowed: the number"),
        (lambda: load_topology("ring"), "topology is 'ring'; allowed: sequential, "),
        (lambda: load_topology("relay", "text"), "handover is 'text'"),
        (lambda: Topology.from_dict({"name": "x"}), "agents is missing"),
        (lambda: Topology.from_dict([]), "agents is missing"),
        (lambda: Topology.from_dict({"agents": [], "edges": 1}), r"unknown keys \['edges'\]"),
        (lambda: Topology.from_dict({"agents": ["a"]}), "agent is 'a'; allowed"),
        (lambda: Topology.from_dict({"agents": [{"name": "a", "sends": []}]}), r"agent a has unknown keys \['sends'\]"),
        (lambda: Topology.from_dict({"agents": [{"name": "a", "receives": "b"}]}), "receives of agent a is 'b'"),
    ],
)
def test_errors(build, message):
    with pytest.raises(TopologyError, match=message):
        build()


def test_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="topology is '.*missing.yaml': no such file"):
        load_topology(str(tmp_path / "missing.yaml"))
    (broken := tmp_path / "broken.yaml").write_text("agents: [")
    with pytest.raises(ValueError, match="broken.yaml is not valid YAML"):
        load_topology(str(broken))


def test_bridges_and_traces_are_told_apart():
    agents = (
        Agent("a"),
        Agent("b", ("a",)),
        Agent("c", ("b", "a"), bridges=("a",)),
        Agent("d", ("c",), bridges=("c",)),
    )
    topology = Topology("mixed", agents)
    a, b, c, d = topology.agents
    assert [topology.bridged(agent) for agent in (a, b, c, d)] == [(), (), ("a",), ("c",)]
    assert [topology.sharing(agent) for agent in (a, b, c, d)] == [(), ("a",), ("b",), ()]
    # Who is read over a bridge brings along nobody's columns.
    assert (
        topology.attended("c") == ("a", "b")
        and topology.attended("d") == ()
        and topology.ancestors("d") == tuple("abc")
    )
    assert [topology.continues(agent) for agent in (a, b, c, d)] == [None, "a", "b", None]
    assert topology.bridge_edges == (("a", "c"), ("c", "d"))
    assert Topology.from_dict(topology.to_dict()) == topology
    everywhere = Topology.from_dict(topology.to_dict(), "bridge")
    assert everywhere.bridge_edges == (("a", "b"), ("b", "c"), ("a", "c"), ("c", "d"))


MODELS = {"small": {"model_name_or_path": "one"}, "large": {"model_name_or_path": "two", "dtype": "bfloat16"}}
TEAM = {
    "models": MODELS,
    "agents": [
        {"name": "a", "model": "small"},
        {"name": "b", "model": "large", "receives": ["a"]},
        {"name": "c", "model": "large", "receives": ["b", "a"]},
    ],
}


def test_between_models_the_hand_over_is_a_bridge():
    topology = Topology.from_dict(TEAM)
    assert topology.handover == "full" and topology.bridge_edges == (("a", "b"), ("a", "c"))
    assert topology.model_names == ("large", "small") and topology.models == MODELS
    assert Topology.from_dict(topology.to_dict()) == topology
    # One that is said is what it is, between models too.
    assert Topology.from_dict(TEAM, "latent").bridge_edges == ()
    # Made alike, they are one, and so is their trace.
    alike = Topology.from_dict(TEAM | {"models": {"small": MODELS["large"], "large": dict(MODELS["large"])}})
    assert len(alike.models) == 1 and alike.bridge_edges == () and alike.attended("c") == ("a", "b")
    one = alone(topology)
    assert one.last.model == "large" and list(one.models) == ["large"] and one.last.role == "single"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ["small"]}, r"models is \['small'\]; allowed: a mapping by name"),
        ({"models": {"small": 3, "large": {}}}, r"model small is 3; allowed: \{model_name_or_path, "),
        ({"models": MODELS | {"default": {}}}, "models has 'default'; allowed: letters, digits and _, and not default"),
        ({"models": MODELS | {"too": {}}}, r"models has \['too'\], which no agent runs on; allowed: large, small"),
        ({"models": {"small": {"dtype": 16}, "large": {}}}, "dtype of model small is 16; allowed: str"),
        ({"models": {"small": {}}}, "model of agent b is 'large'; allowed: small"),
        ({"agents": [{"name": "a", "model": 3}]}, "model of agent a is 3; allowed: the name of a model"),
        ({"adapters": {"small": {}}}, r"adapters has \['small'\], which no agent runs with"),
    ],
)  # fmt: skip
def test_bad_models(change, said):
    with pytest.raises(TopologyError, match=said):
        Topology.from_dict(TEAM | change)
