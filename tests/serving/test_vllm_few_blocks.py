"""With room for few rows, vLLM preempts: what comes back has its trace read again. And entropies, which cost more."""

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm makes one")

import torch
from vllm_bench import Bench, equal

from diffmas import MultiAgentSystem
from diffmas.generation import Decoding
from diffmas.models.pretrained import load_base

LONG = Decoding(max_new_tokens=90, temperature=0)


@pytest.fixture(scope="module")
def system():
    model, tokenizer = load_base()
    return MultiAgentSystem(model, "sequential", tokenizer=tokenizer, prompts="reasoning", latent_steps=3).eval()


@pytest.fixture(scope="module")
def bench(system, tmp_path_factory):
    options = {"num_gpu_blocks_override": 40, "enable_prefix_caching": False}
    made = Bench(str(tmp_path_factory.mktemp("bench")), [system], options, entropies=True)
    yield made
    made.engine.close()


def test_preemption(bench, system, loads):
    encoded = system.collator.encode_prompts([{"question": f"Count from {i} to 9"} for i in range(3)])
    rows = bench.rows(system, encoded, LONG)
    mine = system.generate(**encoded, tokenizer=system.tokenizer, decoding=LONG)
    # Room for two rows as they begin, and for one as it ends.
    found = bench.decode(rows, LONG)
    assert len([load for load in loads if load.trace == rows[0].trace.id]) >= 2
    assert len(loads) > 1 + len(rows)
    equal(mine, found)
    for own, actual in zip(mine, found, strict=True):
        assert len(actual[0].entropies) == len(actual[0].logprobs) > 0
        assert torch.allclose(torch.tensor(own[0].entropies), torch.tensor(actual[0].entropies), atol=1e-4)
