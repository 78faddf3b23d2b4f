"""Bad input names the argument, what it was and what is allowed."""

import pytest
import torch
from tiny_models import causal_lm

from diffmas.agents.controls import mismatched
from diffmas.agents.topology import TOPOLOGIES
from diffmas.generation import Decoding
from diffmas.system import MultiAgentSystem


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0; allowed: integers ≥ 1"),
        (dict(samples=0), "samples is 0; allowed: integers ≥ 1"),
        (dict(max_rows=-1), "max_rows is -1; allowed: integers ≥ 1"),
        (dict(temperature=-0.1), "temperature is -0.1; allowed: finite and ≥ 0"),
        (dict(temperature=float("nan")), "temperature is nan; allowed: finite and ≥ 0"),
        (dict(top_p=0.0), "top_p is 0.0; allowed: 0 < top_p ≤ 1"),
        (dict(seed=-1), "seed is -1; allowed: integers ≥ 0"),
        (dict(stop="end"), "stop is 'end'; allowed: a sequence of strings"),
        (dict(stop=("a", "")), r"stop is \('a', ''\); allowed: a sequence of strings, none of them empty"),
    ],
)
def test_decoding(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


@pytest.mark.parametrize(
    "lengths, options, message",
    [
        ([[2, 2]], {}, r"prompt_lengths of agent single is \[2, 2\] for 3 tokens"),
        ([[3, 0]], {}, r"prompt_lengths of agent single is \[3, 0\]"),
        ([[2], [1]], {}, "prompt_ids has 1 and prompt_lengths 2 entries"),
        ([[2, 1]], dict(seeds=[1]), r"seeds is \[1\]; allowed: 2 integers ≥ 0, one per row"),
        ([[2, 1]], dict(seeds=[1, -2]), r"seeds is \[1, -2\]; allowed: 2 integers ≥ 0, one per row"),
        ([[3]], dict(control=mismatched), "batch is 1; allowed: ≥ 2, a mismatched trace needs another row"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream_tokens"])
def test_rows(method, lengths, options, message, tokenizer):
    system = MultiAgentSystem(causal_lm("qwen3", vocab_size=len(tokenizer)), TOPOLOGIES["single"])
    with pytest.raises(ValueError, match=message):
        list(getattr(system, method)([torch.arange(3)], lengths, tokenizer, Decoding(), **options))
    assert system.training
