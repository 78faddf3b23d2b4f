"""vLLM decodes what our own engine does: greedy tokens are equal in float32, for every topology and hand-over."""

import dataclasses

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm makes one")

from tiny_models import with_lora
from vllm_bench import Bench, equal

from diffmas import MultiAgentSystem
from diffmas.agents.controls import CONTROLS
from diffmas.agents.topology import load_topology
from diffmas.generation import Decoding
from diffmas.models.pretrained import load_base
from diffmas.runs.description import known
from diffmas.serving import connector
from diffmas.serving.traces import StoredTrace
from diffmas.tasks import TaskArguments, load_task

GREEDY = Decoding(max_new_tokens=4, temperature=0)
LONG = Decoding(max_new_tokens=24, temperature=0)
#: Topology, hand-over, adapters.
TEAMS = [
    ("sequential", "full", "shared"),
    ("sequential", "latent", "shared"),
    ("stitch", "full", "shared"),
    ("stitch", "latent", "per_role"),
    ("hierarchical", "full", "shared"),
    ("hierarchical", "latent", "shared"),
    ("sequential", "bridge", "shared"),
    ("hierarchical", "bridge", "per_role"),
    ("single", "full", "shared"),
]


def team(name, handover, adapters):
    """A team with a random adapter, or one a role, on the embedded base."""
    topology = load_topology(name, handover, adapters=adapters)
    model, tokenizer = load_base()
    model = with_lora(model, embeddings=False, adapters=topology.adapter_names[1:])
    return MultiAgentSystem(model, topology, tokenizer=tokenizer, prompts="reasoning", latent_steps=3).eval()


@pytest.fixture(scope="module")
def relay(relay_run):
    return MultiAgentSystem.from_pretrained(relay_run)


@pytest.fixture(scope="module")
def items(relay):
    return load_task(known(TaskArguments, relay.description["task"])).eval


@pytest.fixture(scope="module")
def two_models(relay):
    """The sender on the other embedded base, the solver, with an adapter of its own, on the relay's."""
    topology, (model, tokenizer) = load_topology("two_models"), load_base()
    models, tokenizers = {"default": with_lora(model, embeddings=False)}, {"default": tokenizer}
    return MultiAgentSystem(models, topology, tokenizer=tokenizers, prompts=relay.prompts, latent_steps=3).eval()


@pytest.fixture(scope="module")
def bench(relay, two_models, tmp_path_factory):
    teams = {parts: team(*parts) for parts in TEAMS}
    made = Bench(str(tmp_path_factory.mktemp("bench")), [relay, two_models, *teams.values()])
    made.teams = teams
    yield made
    made.engine.close()


def asked(relay, items, count):
    return relay.collator.encode_prompts([items[i] for i in range(count)])


def own(system, encoded, decoding, **options):
    return system.generate(**encoded, tokenizer=system.tokenizer, decoding=decoding, **options)


def unprobed(rows):
    return [dataclasses.replace(row, probe=None) for row in rows]


def right(items, answers):
    return sum(items[i]["answer"] == answer[0].text for i, answer in enumerate(answers))


def test_heads_of_a_process():
    """As vLLM shares them out: evenly, or each to as many processes as there are for it."""
    assert [connector.own_heads(8, 2, rank) for rank in range(2)] == [slice(0, 4), slice(4, 8)]
    assert [connector.own_heads(2, 4, rank) for rank in range(4)] == [slice(0, 1)] * 2 + [slice(1, 2)] * 2
    assert connector.own_heads(3, 1, 0) == slice(0, 3)


@pytest.mark.parametrize("control", CONTROLS)
def test_trained_relay(bench, relay, items, control):
    encoded = asked(relay, items, 64)
    found = bench.answers(relay, encoded, GREEDY, control=CONTROLS[control])
    equal(own(relay, encoded, GREEDY, control=CONTROLS[control]), found)
    assert right(items, found) >= 62 if control == "matched" else right(items, found) <= 16


def test_without_the_adapter(bench, relay, items):
    """With the trained trace, and LoRA not applied: the probe sees it, and without one the answers are others."""
    rows = bench.rows(relay, asked(relay, items, 64), GREEDY, adapter=None)
    with pytest.raises(ValueError, match="computes something else"):
        bench.decode(rows, GREEDY)
    assert right(items, bench.decode(unprobed(rows), GREEDY)) <= 32


def test_rows_with_and_without_an_adapter(bench, relay, items):
    """Decoded at once: on a CPU, vLLM would take one for the other in a batch."""
    encoded = asked(relay, items, 8)
    with_it = unprobed(bench.rows(relay, encoded, GREEDY))
    without = [dataclasses.replace(row, adapter=None) for row in with_it]
    mixed = [row for pair in zip(with_it, without, strict=True) for row in pair]
    found = bench.decode(mixed, GREEDY)
    equal(bench.decode(with_it, GREEDY), found[::2])
    equal(bench.decode(without, GREEDY), found[1::2])
    assert [a[0].tokens for a in found[::2]] != [a[0].tokens for a in found[1::2]]


@pytest.mark.parametrize("parts", TEAMS, ids="-".join)
def test_teams(bench, parts):
    system = bench.teams[parts]
    texts = [
        "A4 B2 C9. What is B?",
        "3 + 4 =",
        "Recall",
        "x" * 70,
        "Name all of 1 2 3 4 5 6 7 8 and A to F.",
    ]
    encoded = system.collator.encode_prompts([{"question": text} for text in texts])
    rows = bench.rows(system, encoded, LONG)
    lengths = {0 if row.trace is None else row.trace.length for row in rows}
    assert lengths == {0} if parts[0] == "single" else len(lengths) > 1 or parts[1] != "full"
    equal(own(system, encoded, LONG), bench.decode(rows, LONG))


@pytest.mark.parametrize("control", ["matched", "noise"])
def test_two_models(bench, two_models, items, control):
    """What the solver reads over the bridge is in its trace, whoever wrote it."""
    encoded, chosen = asked(two_models, items, 6), CONTROLS[control]
    rows = bench.rows(two_models, encoded, LONG, control=chosen)
    assert {row.trace.length for row in rows} == {3}
    equal(own(two_models, encoded, LONG, control=chosen), bench.decode(rows, LONG))


def test_prefix_cache(bench, loads):
    """A trace that is decoded behind again is read of the cache: whole blocks of it, where other tokens follow."""
    system = bench.teams["sequential", "full", "shared"]
    encoded = system.collator.encode_prompts(
        [{"question": "Which letter comes after this one? " * 4 + c} for c in "AB"]
    )
    rows = bench.rows(system, encoded, LONG)
    once, again = bench.decode(rows, LONG), bench.decode(rows, LONG)
    equal(own(system, encoded, LONG), once)
    equal(once, again)
    length = rows[0].trace.length
    assert length % 32
    assert [load.begin for load in loads] == [0, 0]
    other = [dataclasses.replace(row, prompt=row.prompt[::-1]) for row in unprobed(rows)]
    cached = bench.decode(other, LONG)
    assert [load.begin for load in loads[2:]] == [length // 32 * 32] * 2
    assert bench.engine._engine.reset_prefix_cache()
    equal(bench.decode(other, LONG), cached)
    assert [load.begin for load in loads[4:]] == [0, 0]
    # What another adapter has computed is not taken.
    without = [dataclasses.replace(row, adapter=None) for row in unprobed(rows)]
    assert [a[0].tokens for a in bench.decode(without, LONG)] != [a[0].tokens for a in once]
    assert [load.begin for load in loads[6:]] == [0, 0]


def test_another_rows_salt_is_refused(bench, relay, items, monkeypatch):
    encoded = asked(relay, items, 6)
    rows = unprobed(bench.rows(relay, encoded, GREEDY))
    monkeypatch.setattr(StoredTrace, "cache_salt", "one of all")
    with pytest.raises(RuntimeError, match="error"):
        bench.decode(rows, GREEDY)
    monkeypatch.undo()
    equal(own(relay, encoded, GREEDY), bench.decode(rows, GREEDY))


def test_why_there_is_a_salt(bench, monkeypatch):
    """With one salt of all, blocks of one row's trace are taken for another's."""
    system = bench.teams["sequential", "full", "shared"]
    encoded = system.collator.encode_prompts([{"question": f"{i} is the number of this one. " * 4} for i in range(4)])
    rows = unprobed(bench.rows(system, encoded, LONG))
    mine = own(system, encoded, LONG)
    monkeypatch.setattr(StoredTrace, "cache_salt", "one of all")
    monkeypatch.setattr(connector, "_refusal", lambda request, params: None)
    found = bench.decode(rows, LONG)
    assert [a[0].tokens for a in mine] != [a[0].tokens for a in found]
    monkeypatch.undo()
    equal(mine, bench.decode(rows, LONG))


@pytest.mark.parametrize(
    "change", [{"id": "0" * 64}, {"length": 3}, {"length": 10_000}, {"length": 0}], ids=["id", "short", "long", "none"]
)
def test_wrong_traces_fail_their_request_alone(bench, relay, items, change, monkeypatch):
    encoded = asked(relay, items, 2)
    rows = unprobed(bench.rows(relay, encoded, GREEDY))
    params, wrong = connector.transfer_params, dataclasses.replace(rows[1].trace, **change)
    monkeypatch.setattr(connector, "transfer_params", lambda trace: params(wrong if trace == rows[1].trace else trace))
    if "id" in change:
        monkeypatch.setattr(connector, "cache_salt", lambda trace_id: rows[1].trace.cache_salt)
    with pytest.raises(RuntimeError, match="error"):
        bench.decode(rows[1:], GREEDY)
    monkeypatch.setattr(connector, "transfer_params", params)
    monkeypatch.undo()
    equal(own(relay, encoded, GREEDY), bench.decode(rows, GREEDY))


def test_another_models_traces_are_refused(bench, relay, items):
    encoded = asked(relay, items, 1)
    model, bench.model = bench.model, "another"
    rows = bench.rows(relay, encoded, GREEDY)
    bench.model = model
    with pytest.raises(RuntimeError, match="error"):
        bench.decode(rows, GREEDY)


@pytest.mark.parametrize("option", [{"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}], ids=lambda o: [*o][0])
def test_what_would_read_placeholders_fails(bench, relay, items, option, monkeypatch):
    rows = unprobed(bench.rows(relay, asked(relay, items, 1), GREEDY))
    sampling = bench.engine._sampling
    with_option = lambda *args: _with(sampling(*args), option)  # noqa: E731
    monkeypatch.setattr(bench.engine, "_sampling", with_option)
    with pytest.raises(RuntimeError, match="error"):
        bench.decode(rows, GREEDY)


def _with(sampling, option):
    for name, value in option.items():
        setattr(sampling, name, value)
    if "prompt_logprobs" in option:
        sampling.skip_reading_prefix_cache = True
    return sampling


def test_a_probe_that_disagrees_is_told(bench, relay, items):
    (row,) = bench.rows(relay, asked(relay, items, 1), GREEDY)
    token, logprob = max(row.probe.items(), key=lambda pair: pair[1])
    wrong = dataclasses.replace(row, probe={**row.probe, token: logprob - 0.1})
    with pytest.raises(ValueError, match="computes something else"):
        bench.decode([wrong], GREEDY)
    wrong = dataclasses.replace(row, probe={token + 1: 0.0})
    with pytest.raises(ValueError, match="computes something else"):
        bench.decode([wrong], GREEDY)


def test_samples(bench, relay, items):
    """The same seeds give the same answers, in whatever company; samples and neighbouring seeds differ."""
    system = bench.teams["sequential", "latent", "shared"]
    encoded = system.collator.encode_prompts([{"question": "Any"}, {"question": "Any"}])
    decoding = Decoding(max_new_tokens=24, temperature=1.0, top_p=0.99, samples=3)
    rows = bench.rows(system, encoded, decoding, seeds=[5, 6])
    found, alone = bench.decode(rows, decoding), bench.decode(rows[1:], decoding)
    assert [a.tokens for a in found[1]] == [a.tokens for a in alone[0]]
    assert len({tuple(a.tokens) for row in found for a in row}) == 6
    greedy = bench.decode(rows, dataclasses.replace(decoding, temperature=0))
    assert len({tuple(a.tokens) for row in greedy for a in row}) == 1


def test_stop_strings(bench):
    system = bench.teams["stitch", "full", "shared"]
    encoded = system.collator.encode_prompts([{"question": "1 2 3"}, {"question": "A B"}])
    texts = [row[0].text for row in own(system, encoded, LONG)]
    stop = tuple(text[len(text) // 2 :][:3] for text in texts)
    assert all(stop)
    decoding = dataclasses.replace(LONG, stop=stop)
    mine = own(system, encoded, decoding)
    assert {row[0].finish for row in mine} == {"stop"}
    equal(mine, bench.answers(system, encoded, decoding))


def test_bad_input(bench, relay, items):
    rows = bench.rows(relay, asked(relay, items, 1), GREEDY)
    with pytest.raises(ValueError, match="max_new_tokens is 2000 .*max_model_len is 1024; allowed: up to "):
        bench.decode(rows, Decoding(max_new_tokens=2000, temperature=0))
    with pytest.raises(ValueError, match="temperature is 0.005; allowed with vLLM: 0, or ≥ 0.01"):
        bench.decode(rows, Decoding(max_new_tokens=4, temperature=0.005))
    other = dataclasses.replace(rows[0], adapter=dataclasses.replace(bench.adapters[0], name="other"))
    with pytest.raises(ValueError, match=r"adapters are \['other'\]"):
        bench.decode([other], GREEDY)
