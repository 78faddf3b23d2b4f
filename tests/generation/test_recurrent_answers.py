"""Answers of models with recurrent layers: row by row those of one forward over everything, whoever else is decoded."""

import copy

import pytest
import torch
from hybrids import chain, hybrid, read
from tiny_models import packed, ragged

from diffmas.agents.controls import mismatched
from diffmas.agents.topology import load_topology
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem

ROWS, STEPS, NEW = 7, 2, 9


def alone(model, prompts, stops):
    """Greedy tokens of every row, each from a forward over its whole past."""
    found = []
    for row in range(ROWS):
        inputs, tokens = chain(model, [rows[row] for rows in prompts.values()], STEPS), []
        while len(tokens) < NEW:
            token = int(model.get_output_embeddings()(read(model, inputs)[-1]).argmax())
            if token in stops:
                break
            tokens.append(token)
            inputs.append(model.get_input_embeddings()(torch.tensor([token])))
        found.append(tokens)
    return found


@pytest.mark.parametrize("family", ["qwen3_next", "granite", "falcon_h1", "lfm2", "jamba", "nemotron_h"])
@torch.no_grad()
def test_greedy(family, tokenizer):
    model = hybrid(family, vocab_size=len(tokenizer)).eval()
    system = MultiAgentSystem(copy.deepcopy(model), load_topology("relay", "full"), latent_steps=STEPS)
    model.set_attn_implementation("eager")
    prompts, _ = ragged(["sender", "solver"], ROWS)
    # So that some answers stop early, make room, and others enter beside those that go on.
    stops = list(range(0, len(tokenizer), 5))
    system.agent_model.language_model.generation_config.eos_token_id = stops
    expected = alone(model, prompts, {*stops, tokenizer.eos_token_id})
    assert len({len(tokens) for tokens in expected}) > 2
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    for options in (dict(), dict(max_rows=3), dict(max_rows=3, samples=2)):
        decoding = Decoding(max_new_tokens=NEW, temperature=0, **options)
        found = system.generate(ids, lengths, tokenizer, decoding)
        assert [[answer.tokens for answer in samples] for samples in found] == [
            [tokens] * decoding.samples for tokens in expected
        ]


@torch.no_grad()
def test_a_mismatched_trace_is_another_rows(tokenizer):
    model = hybrid("qwen3_next", vocab_size=len(tokenizer)).eval()
    system = MultiAgentSystem(model, load_topology("relay", "full"), latent_steps=STEPS)
    prompts, _ = ragged(["sender", "solver"], 3)
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    decoding = Decoding(max_new_tokens=NEW, temperature=0)
    found = system.generate(ids, lengths, tokenizer, decoding, control=mismatched)
    senders = [prompts["sender"][row] for row in (1, 2, 0)]
    ids = [torch.cat(senders), ids[1]]
    exchanged = system.generate(ids, [[len(s) for s in senders], lengths[1]], tokenizer, decoding)
    assert [row[0].tokens for row in found] == [row[0].tokens for row in exchanged]
