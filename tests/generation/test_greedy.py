"""Greedy answers of a single agent are those of transformers' `generate`, token by token."""

import copy

import pytest
import torch
from stock import greedy, prompts
from tiny_models import causal_lm, clone, packed

from diffmas.agents.collator import Collator
from diffmas.agents.topology import TOPOLOGIES
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem
from diffmas.tasks import TaskArguments, load_task

NEW = 40


def check(model, rows, tokenizer, texts, logits, **options):
    ids, lengths = packed(rows)
    # As PEFT leaves a base model: layers that do not train may run fused.
    system = MultiAgentSystem(model.requires_grad_(False), TOPOLOGIES["single"])
    answers = system.generate([ids], [lengths], tokenizer, Decoding(max_new_tokens=NEW, temperature=0, **options))
    assert len(answers) == len(rows)
    for samples, tokens, row_logits in zip(answers, texts, logits, strict=True):
        for answer in samples:
            assert answer.tokens == tokens
            assert answer.finish == ("length" if len(tokens) == NEW else "stop")
            assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
            steps = min(NEW, len(tokens) + 1)
            distribution = torch.distributions.Categorical(logits=row_logits[:steps].double())
            chosen = distribution.logits.argmax(-1)
            assert chosen[: len(tokens)].tolist() == tokens
            for actual, expected in (
                (answer.logprobs, distribution.log_prob(chosen)),
                (answer.entropies, distribution.entropy()),
            ):
                assert torch.allclose(torch.tensor(actual, dtype=torch.float64), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("batch", [1, 16])
def test_random_weights(family, batch, tokenizer):
    model = causal_lm(family, eos_token_id=None, vocab_size=len(tokenizer)).eval()
    rows = prompts(batch, len(tokenizer))
    expected, logits = greedy(clone(model), rows, tokenizer, NEW)
    check(model, rows, tokenizer, expected, logits)
    check(model, rows, tokenizer, expected, logits, max_rows=5)
    check(model, rows, tokenizer, expected, logits, max_rows=5, samples=3)


def test_early_stops_make_room(tokenizer):
    model = causal_lm("qwen3", vocab_size=len(tokenizer)).eval()
    model.generation_config.eos_token_id = stops = list(range(0, len(tokenizer), 20))
    rows = prompts(16, len(tokenizer))
    expected, logits = greedy(clone(model), rows, tokenizer, NEW, stops)
    assert len({len(tokens) for tokens in expected}) > 4
    for samples in (1, 2):
        check(model, rows, tokenizer, expected, logits, max_rows=4, samples=samples)


@pytest.mark.parametrize("batch", [1, 16])
def test_embedded_base(batch, tokenizer, embedded_base):
    task = load_task(TaskArguments())
    items = [task.eval[i] for i in range(batch)]
    encoded = Collator(TOPOLOGIES["single"], task.prompts, tokenizer).encode_prompts(items)
    rows = list(encoded["prompt_ids"][0].split(encoded["prompt_lengths"][0]))
    expected, logits = greedy(copy.deepcopy(embedded_base), rows, tokenizer, NEW)
    assert any(tokenizer.decode(tokens) == item["answer"] for tokens, item in zip(expected, items, strict=True))
    check(copy.deepcopy(embedded_base), rows, tokenizer, expected, logits)
