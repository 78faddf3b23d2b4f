"""A row's answers depend on its prompts and its seed alone: not on its batch, its place in it, or when it came in."""

import pytest
import torch
from tiny_models import causal_lm, packed, ragged

from diffmas.agents.controls import matched, noise
from diffmas.agents.topology import load_topology
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem

ROWS = 16


def answers(system, prompts, rows, tokenizer, control=None, **options):
    ids, lengths = zip(*(packed([p[row] for row in rows]) for p in prompts.values()), strict=True)
    decoding = Decoding(**dict(max_new_tokens=30, temperature=0.9, top_p=0.9) | options)
    seeds = [100 + row for row in rows]
    found = system.generate(ids, lengths, tokenizer, decoding, seeds=seeds, control=control)
    return {row: [answer.tokens for answer in samples] for row, samples in zip(rows, found, strict=True)}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "dtype, topology, control", [(torch.float64, "stitch", noise), (torch.float32, "relay", matched)]
)
def test_alone_and_together(dtype, topology, control, samples, tokenizer):
    model = causal_lm("qwen3", dtype=dtype, vocab_size=len(tokenizer), initializer_range=0.15)
    system = MultiAgentSystem(model, load_topology(topology), latent_steps=2)
    prompts, _ = ragged([a.name for a in system.topology.agents], ROWS)
    # So that some answers stop early, make room, and others enter beside those that go on.
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 40))
    options = dict(tokenizer=tokenizer, control=control, samples=samples)
    together = answers(system, prompts, range(ROWS), **options)
    lengths = {len(tokens) for row in together.values() for tokens in row}
    assert len(lengths) > 3
    assert answers(system, prompts, range(ROWS), max_rows=5, **options) == together
    assert answers(system, prompts, range(ROWS)[::-1], max_rows=7, **options) == together
    for row in (0, 3, 15):
        assert answers(system, prompts, [row], **options) == {row: together[row]}


def test_a_sample_is_the_same_among_others(tokenizer):
    model = causal_lm("llama", vocab_size=len(tokenizer))
    system = MultiAgentSystem(model, load_topology("relay", "full"), latent_steps=1)
    prompts, _ = ragged(["sender", "solver"], 3)
    few, many = (answers(system, prompts, range(3), tokenizer, samples=n) for n in (1, 4))
    assert {row: samples[:1] for row, samples in many.items()} == few


def test_seed_decides(tokenizer):
    system = MultiAgentSystem(causal_lm("qwen3", vocab_size=len(tokenizer)), load_topology("single"))
    ids, lengths = packed([torch.arange(5)] * 2)

    def decode(seed=0, **options):
        found = system.generate([ids], [lengths], tokenizer, Decoding(max_new_tokens=8, seed=seed), **options)
        return [row[0].tokens for row in found]

    assert decode(3) == decode(seeds=[3, 4]) != decode(4)
    assert decode(seeds=[7, 7])[0] == decode(seeds=[7, 7])[1]
