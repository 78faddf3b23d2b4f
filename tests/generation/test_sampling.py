"""Sampled tokens have the probabilities they should have; the nucleus is the nucleus."""

import math

import pytest
import torch
from tiny_models import causal_lm

from diffmas.agents.topology import TOPOLOGIES
from diffmas.generation import Decoding, sampling
from diffmas.generation.sampling import Draws, Uniforms, choose
from diffmas.system import MultiAgentSystem


def chi_square_bound(cells):
    """A value that chi-square with `cells - 1` degrees of freedom exceeds once in 10⁵ (Wilson and Hilferty)."""
    n = cells - 1
    return n * (1 - 2 / (9 * n) + 4.265 * math.sqrt(2 / (9 * n))) ** 3


def nucleus(logits, temperature, top_p):
    """One row's tokens, most probable first, and their probabilities: those it takes for their mass to reach top_p."""
    weights = (logits.double() / temperature).softmax(-1).tolist()
    tokens, mass = [], 0.0
    for token in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        if mass >= top_p:
            break
        tokens.append(token)
        mass += weights[token]
    return tokens, [weights[token] / mass for token in tokens]


@pytest.mark.parametrize("vocab", [7, 1000, 3000])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (1.0, 0.5), (3.0, 0.999)])
def test_against_the_definition(vocab, temperature, top_p):
    generator = torch.Generator().manual_seed(vocab)
    rows = 12
    logits = 2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    # Many equal probabilities, as rounding to bfloat16 makes them.
    logits[::2] = logits[::2].round()
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    tokens, reported = choose(logits, uniforms, temperature, top_p)
    for row, u, token, (reported_token, logprob, entropy) in zip(logits, uniforms, tokens, reported, strict=True):
        kept = dict(zip(*nucleus(row, temperature, top_p), strict=True))
        order = sorted(kept) if top_p == 1 else list(kept)
        below = sum(kept[i] for i in order[: order.index(int(token))])
        assert reported_token == token
        assert below - 1e-12 <= u <= below + kept[int(token)] + 1e-12
        model = torch.distributions.Categorical(logits=row)
        assert logprob == pytest.approx(float(model.log_prob(token)), abs=1e-12)
        assert entropy == pytest.approx(float(model.entropy()), abs=1e-10)


def test_large_nuclei_are_sorted(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5000, generator=generator) * torch.tensor([[8.0], [0.1], [8.0], [1.0], [0.0], [3.0]])
    uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
    sorted_rows = []
    original = sampling._from_sorted

    def counting(logits, *rest):
        sorted_rows.append(len(logits))
        return original(logits, *rest)

    monkeypatch.setattr(sampling, "_from_sorted", counting)
    tokens, reported = choose(logits, uniforms, 0.8, 0.95)
    # Flat rows have nuclei of thousands of tokens; the steep ones need no sort.
    assert sorted_rows == [3]
    assert tokens.tolist() == original(logits, uniforms, 0.8, 0.95).tolist()
    logprobs = logits.log_softmax(-1)
    assert [r[0] for r in reported] == tokens.tolist()
    assert [r[1] for r in reported] == pytest.approx(logprobs.gather(1, tokens[:, None])[:, 0].tolist())


def test_impossible_tokens_do_not_spoil_the_entropy():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    for top_p in (0.9, 1.0):
        tokens, [(_, logprob, entropy)] = choose(logits, torch.tensor([0.9], dtype=torch.float64), 1.0, top_p)
        assert tokens.tolist() == [2]
        assert (logprob, entropy) == pytest.approx((-math.log(2), math.log(2)))


def test_draws_are_the_answer_s_own():
    uniforms = Uniforms(torch.device("cpu"))
    numbers = {(seed, sample): Draws(seed, sample).peek(200).tolist() for seed in (0, 1, 2**40) for sample in (0, 1)}
    assert len({x for row in numbers.values() for x in row}) == 6 * 200
    draws = {key: Draws(*key) for key in numbers}
    taken = {key: [] for key in numbers}
    keys = list(numbers)
    for step in range(200):
        # Answers come and go.
        present = [key for i, key in enumerate(keys) if (step // 30) % (i + 1) == 0]
        for key, u in zip(present, uniforms.next([draws[key] for key in present]).tolist(), strict=True):
            taken[key].append(u)
    assert all(len(row) > 20 and row == numbers[key][: len(row)] for key, row in taken.items())


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.95)])
def test_frequencies(temperature, top_p, tokenizer):
    """Of 2000 two-token answers: the first tokens, and the second ones behind the most frequent first one."""
    model = causal_lm("qwen3", vocab_size=len(tokenizer), tied=True, initializer_range=0.5)
    model.generation_config.eos_token_id = None
    system = MultiAgentSystem(model, TOPOLOGIES["single"])
    prompt = torch.tensor([5, 6, 7])
    count = 2000
    decoding = Decoding(
        max_new_tokens=2, temperature=temperature, top_p=top_p, samples=count, max_rows=count, stop=(), seed=11
    )
    [answers] = system.generate([prompt], [[3]], tokenizer, decoding)
    drawn = [tuple(a.tokens) for a in answers if len(a.tokens) == 2]
    assert len(drawn) > 0.98 * count

    def check(drawn, context):
        trace = system.trajectory.communicate([context], [[len(context)]]).trace
        logits = model.get_output_embeddings()(system.agent_model.read(trace, [len(context)], input_ids=context)[-1])
        tokens, probabilities = nucleus(logits.detach(), temperature, top_p)
        assert set(drawn) <= set(tokens)
        counts, expected = torch.tensor(
            [[drawn.count(t), len(drawn) * p] for t, p in zip(tokens, probabilities, strict=True)]
        ).T
        # Cells of few expected counts are taken together.
        rare = expected < 5
        counts, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, expected))
        cells = int((expected > 0).sum())
        assert cells >= 5
        assert float(((counts - expected).square() / expected.clamp(min=1e-9)).sum()) < chi_square_bound(cells)

    check([first for first, _ in drawn], prompt)
    most = max({first for first, _ in drawn}, key=[first for first, _ in drawn].count)
    check([second for first, second in drawn if first == most], torch.tensor([5, 6, 7, most]))
