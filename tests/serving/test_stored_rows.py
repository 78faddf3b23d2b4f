"""What is stored for another engine is what ours would go on with: traces, probes, weights."""

import contextlib

import pytest
import torch
from tiny_models import causal_lm, clone, packed, ragged, with_lora
from transformers import AutoModelForCausalLM, DynamicCache

from diffmas import MultiAgentSystem
from diffmas.agents.controls import CONTROLS
from diffmas.agents.topology import Agent, Topology, load_topology
from diffmas.agents.trajectory import HandedOver
from diffmas.generation import Decoding
from diffmas.models.adapters import without_adapters
from diffmas.serving.rows import check_embeddable, embedded_rows, store_rows
from diffmas.serving.traces import TraceStore, read_trace
from diffmas.serving.weights import base_weights, fingerprint, loadable, running_adapter, write_adapter, write_base

GREEDY = Decoding(max_new_tokens=5, temperature=0, max_rows=3)


def asked(system, rows, seed=0):
    prompts, _ = ragged([agent.name for agent in system.topology.agents], rows, seed=seed)
    ids, lengths = zip(*(packed(p) for p in prompts.values()), strict=True)
    return list(ids), list(lengths)


def system_of(name="stitch", handover="full", adapters="shared", **options):
    topology = load_topology(name, handover, adapters=adapters)
    model = with_lora(causal_lm("qwen3", **options), embeddings=False, adapters=topology.adapter_names[1:])
    return MultiAgentSystem(model, topology, latent_steps=2).eval()


@pytest.mark.parametrize(("name", "handover"), [("sequential", "full"), ("stitch", "latent"), ("hierarchical", "full")])
@pytest.mark.parametrize("control", CONTROLS)
def test_traces_are_what_the_last_agent_receives(tmp_path, name, handover, control):
    """Seven rows in blocks of three and four: every one's trace is the one it gets among its block's."""
    system, store = system_of(name, handover), TraceStore(tmp_path)
    ids, lengths = asked(system, 7)
    seeds = list(range(10, 17))
    rows = list(store_rows(
        system, ids, lengths, GREEDY, store, "m", None, seeds=seeds, control=CONTROLS[control]
    ))  # fmt: skip
    assert [row.seed for row in rows] == seeds and [row.beside for row in rows] == [3] * 3 + [4] * 4
    split = [agent.split(list(n)) for agent, n in zip(ids, lengths, strict=True)]
    for block in (range(3), range(3, 7)):
        parts = [packed([agent[i] for i in block]) for agent in split]
        with torch.no_grad():
            trace = system.trajectory.communicate(*map(list, zip(*parts, strict=True))).trace
            trace = CONTROLS[control](HandedOver(trace, []), [seeds[i] for i in block]).trace
        for own, i in enumerate(block):
            assert rows[i].prompt == tuple(split[-1][i].tolist())
            n = trace.host_lengths[own]
            assert rows[i].length == n + len(rows[i].prompt)
            _, layers = read_trace(store.path(rows[i].trace.id), n)
            for layer, stack in enumerate(layers):
                for found, x in zip(stack, trace.storage.layer(layer), strict=True):
                    assert torch.allclose(found, x[own, :, :n].transpose(0, 1), atol=1e-12, rtol=1e-10)


def on_two_models():
    """An agent on one model, and two on another that read over bridges and of each other's trace."""
    agents = Agent("a", (), model="small"), Agent("b", ("a",), model="large"), Agent("c", ("a", "b"), model="large")
    topology = Topology("two", agents, models={"small": {}, "large": {}})
    sizes = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, vocab_size=41)
    models = {"small": causal_lm("qwen3"), "large": causal_lm("llama", seed=1, **sizes)}
    models = {name: with_lora(model, embeddings=False) for name, model in models.items()}
    return MultiAgentSystem(models, topology, latent_steps=2, bridge_initial="random").eval()


@pytest.mark.parametrize(
    "make",
    [lambda h=h, n=n: system_of(n, h) for n in ("sequential", "hierarchical") for h in ("full", "latent", "bridge")]
    + [on_two_models],
    ids=[f"{n}-{h}" for n in ("sequential", "hierarchical") for h in ("full", "latent", "bridge")] + ["two models"],
)
def test_a_plain_model_goes_on_behind_a_trace(tmp_path, tokenizer, make):
    """transformers' own cache, filled from the file, and the prompt: what our engine finds of the first token."""
    system, store = make(), TraceStore(tmp_path)
    ids, lengths = asked(system, 3)
    rows = list(store_rows(system, ids, lengths, GREEDY, store, "m", None))
    twin = clone(system.agent_model.model)
    for row, (answer,) in zip(rows, system.generate(ids, lengths, tokenizer, GREEDY), strict=True):
        cache = DynamicCache()
        for layer, stack in enumerate(read_trace(store.path(row.trace.id))[1]):
            cache.update(*(x.transpose(0, 1)[None] for x in stack), layer)
        with torch.no_grad():
            logits = twin(input_ids=torch.tensor([row.prompt]), past_key_values=cache).logits[0, -1]
        assert answer.logprobs[0] == pytest.approx(float(logits.log_softmax(-1).max()), rel=1e-10)


@pytest.mark.parametrize("latent_steps", [0, 3])
@pytest.mark.parametrize("name", ["sequential", "single"])
def test_a_plain_model_reads_embeddings(tokenizer, name, latent_steps):
    """transformers' model alone over all of a row's embeddings, in blocks of three and four rows."""
    model = with_lora(causal_lm("qwen3"), embeddings=False)
    system = MultiAgentSystem(model, load_topology(name), latent_steps=latent_steps).train()
    ids, lengths = asked(system, 7)
    rows = list(embedded_rows(system, ids, lengths, GREEDY, None, seeds=range(7)))
    assert system.training and [row.seed for row in rows] == list(range(7))
    twin, answers = clone(model), system.generate(ids, lengths, tokenizer, GREEDY)
    for i, (row, (answer,)) in enumerate(zip(rows, answers, strict=True)):
        assert row.trace is None and row.prompt == tuple(ids[-1].split(lengths[-1])[i].tolist())
        assert row.length == sum(n[i] for n in lengths) + latent_steps * (len(ids) - 1)
        with torch.no_grad():
            logprobs = twin(inputs_embeds=row.embeddings[None]).logits[0, -1].log_softmax(-1)
        assert answer.logprobs[0] == pytest.approx(float(logprobs.max()), rel=1e-10)
        if i == 0:
            assert row.probe == pytest.approx({token: float(logprobs[token]) for token in row.probe}, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: system_of("stitch"), "topology is 'stitch' .*where agent .* does not go on with"),
        (lambda: system_of("hierarchical"), "topology is 'hierarchical'"),
        (lambda: system_of("sequential", "latent"), "handover 'latent'"),
        (lambda: system_of("sequential", "bridge"), "handover 'bridge'"),
        (lambda: system_of("sequential", adapters="per_role"), "adapter is 'critic' for agent critic and 'planner'"),
        (on_two_models, "topology is 'two'"),
    ],
)
def test_traces_that_the_last_agent_would_not_write(make, message):
    with pytest.raises(ValueError, match=message + ".*allowed with prompt embeddings: a chain with handover 'full'"):
        check_embeddable(make())


@pytest.mark.parametrize("adapter", [True, False])
def test_a_probe_is_the_first_tokens_distribution(tmp_path, tokenizer, adapter):
    system = system_of(adapters="per_role", vocab_size=len(tokenizer))
    ids, lengths = asked(system, 3)
    model = system.agent_model.model
    with torch.no_grad(), contextlib.nullcontext() if adapter else without_adapters(model):
        first, *others = store_rows(system, ids, lengths, GREEDY, TraceStore(tmp_path), "m", None)
        (answer,) = system.generate(ids, lengths, tokenizer, GREEDY)[0]
    token = max(first.probe, key=first.probe.get)
    assert token == (answer.tokens or [tokenizer.eos_token_id])[0]
    assert first.probe[token] == pytest.approx(answer.logprobs[0], abs=1e-5)
    assert all(row.probe is None for row in others)


def test_one_agent_has_no_trace(tmp_path):
    system = MultiAgentSystem(causal_lm("qwen3"), load_topology("single")).eval()
    rows = list(store_rows(system, *asked(system, 2), GREEDY, TraceStore(tmp_path), "m", None))
    assert [row.trace for row in rows] == [None, None] and rows[0].probe and not list(tmp_path.iterdir())


def test_bad_seeds(tmp_path):
    system = system_of()
    with pytest.raises(ValueError, match="seeds is "):
        list(store_rows(system, *asked(system, 2), GREEDY, TraceStore(tmp_path), "m", None, seeds=[1]))


def test_the_base_is_written_without_adapters(tmp_path, tokenizer):
    model = causal_lm("qwen3", dtype=torch.float32, vocab_size=len(tokenizer), tied=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    system = MultiAgentSystem(with_lora(model, embeddings=False), load_topology("relay"))
    assert {name: x.shape for name, x in base_weights(system).items()} == {n: x.shape for n, x in before.items()}
    loaded = AutoModelForCausalLM.from_pretrained(write_base(system, tokenizer, tmp_path / "base"))
    assert type(loaded).__name__ == "Qwen3ForCausalLM"
    assert all(torch.equal(x, before[name]) for name, x in loaded.state_dict().items())
    assert loadable(system) is None


def test_fingerprints_are_of_the_base_alone():
    one, other = system_of(), system_of()
    assert fingerprint(one) == fingerprint(other)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            parameter.data += 1
    assert fingerprint(one) == fingerprint(other)
    next(p for n, p in other.named_parameters() if "base_layer" in n).data.view(-1)[0] += 1e-9
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) != fingerprint(system_of(rms_norm_eps=1e-5))


def test_adapters_are_called_like_their_content(tmp_path):
    system = system_of(adapters="per_role")
    first = write_adapter(system, "default", tmp_path)
    assert first == write_adapter(system, "default", tmp_path) and first.rank == 2
    assert first.targets == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert write_adapter(system, system.topology.adapter_names[1], tmp_path).name != first.name
    next(p for n, p in system.named_parameters() if "lora_A.default" in n).data.view(-1)[0] += 1e-3
    assert write_adapter(system, "default", tmp_path).name != first.name
    assert sorted(p.name for p in tmp_path.iterdir())[0].startswith("default-") and len(list(tmp_path.iterdir())) == 3


def test_which_adapter_runs():
    shared, alone = system_of(), MultiAgentSystem(causal_lm("qwen3"), load_topology("single"))
    assert running_adapter(shared) == "default" and running_adapter(alone) is None
    with without_adapters(shared.agent_model.model):
        assert running_adapter(shared) is None
    assert running_adapter(shared) == "default"
