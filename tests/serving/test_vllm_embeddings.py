"""Chains with full hand-over as input embeddings alone: vLLM writes the whole trace itself, and answers as we do."""

import dataclasses

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm makes one")

import torch
from tiny_models import with_lora
from vllm_bench import Bench, equal

from diffmas import MultiAgentSystem
from diffmas.agents.topology import load_topology
from diffmas.generation import Decoding
from diffmas.models.pretrained import load_base
from diffmas.serving.rows import embedded_rows
from diffmas.serving.traces import StoredTrace

LONG = Decoding(max_new_tokens=24, temperature=0, max_rows=4)
TEXTS = ["A4 B2 C9. What is B?", "3 + 4 =", "Recall", "x" * 70, "y" * 70, "Name all of 1 2 3 4 5 6 7 8 and A to F."]


def team(name):
    model, tokenizer = load_base()
    topology = load_topology(name, "full")
    model = with_lora(model, embeddings=False)
    return MultiAgentSystem(model, topology, tokenizer=tokenizer, prompts="reasoning", latent_steps=3).eval()


@pytest.fixture(scope="module")
def systems():
    return [team("sequential"), team("single")]


@pytest.fixture(scope="module")
def bench(systems, tmp_path_factory):
    made = Bench(str(tmp_path_factory.mktemp("bench")), systems, embedded=True)
    yield made
    made.engine.close()


def asked(system):
    encoded = system.collator.encode_prompts([{"question": text} for text in TEXTS])
    return encoded, system.generate(**encoded, tokenizer=system.tokenizer, decoding=LONG)


@pytest.mark.parametrize("which", [0, 1], ids=["sequential", "single"])
def test_greedy(bench, systems, which):
    """Twice: the second time whole blocks come from vLLM's prefix cache, where rows of one length are kept apart."""
    encoded, own = asked(systems[which])
    rows = bench.rows(systems[which], encoded, LONG)
    assert rows[0].probe and all(row.trace is None for row in rows)
    for _ in range(2):
        equal(own, bench.decode(rows, LONG))


def test_what_is_read_is_what_was_handed_over(bench, systems):
    encoded, own = asked(systems[0])
    rows = [dataclasses.replace(row, probe=None) for row in bench.rows(systems[0], encoded, LONG)]
    assert rows[3].length == rows[4].length
    swapped = [dataclasses.replace(rows[3], embeddings=rows[4].embeddings)]
    equal(own[4:5], bench.decode(swapped, LONG))
    changed = [dataclasses.replace(row, embeddings=row.embeddings.roll(1, 0)) for row in rows]
    assert [a[0].tokens for a in bench.decode(changed, LONG)] != [a[0].tokens for a in own]


def test_without_the_adapter(bench, systems):
    encoded, own = asked(systems[0])
    rows = list(embedded_rows(systems[0], *encoded.values(), LONG, None))
    with pytest.raises(ValueError, match="computes something else"):
        bench.decode(rows, LONG)
    rows = [dataclasses.replace(row, probe=None) for row in rows]
    assert [a[0].tokens for a in bench.decode(rows, LONG)] != [a[0].tokens for a in own]


def test_traces_are_refused(bench, systems):
    """Without a connector, vLLM would read the placeholders."""
    (row, *_) = bench.rows(systems[0], asked(systems[0])[0], LONG)
    row = dataclasses.replace(row, embeddings=None, trace=StoredTrace("0" * 64, 3))
    with pytest.raises(ValueError, match="rows have traces; allowed: embeddings, which the engine was started for"):
        bench.decode([row], LONG)


def test_wrong_sizes(bench, systems):
    (row, *_) = bench.rows(systems[0], asked(systems[0])[0], LONG)
    row = dataclasses.replace(row, probe=None, embeddings=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"embeddings are .*\(5, 3\)"):
        bench.decode([row], LONG)
