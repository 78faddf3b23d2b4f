"""As many sweeps as latent steps are exact on families whose norms and routers compute in float32 of their own."""

import contextlib

import pytest
from compare import assert_same, error, gradients

from benchmarks.models.comparison import DAGS, ragged
from benchmarks.models.configurations import causal_lm
from benchmarks.models.precision import widened
from diffmas.agents.topology import Agent, Topology
from diffmas.system import MultiAgentSystem

CHAIN = Topology("chain", tuple(Agent(*item) for item in DAGS["sequential"].items()))
STEPS = 3


def step(family, latent_backward, wide):
    """Logits, and the gradients of all weights."""
    with widened() if wide else contextlib.nullcontext():
        model = causal_lm(family, "own").train()
        system = MultiAgentSystem(model, CHAIN, latent_steps=STEPS, latent_backward=latent_backward)
        prompts, answers = ragged(list(DAGS["sequential"]))
        ids, lengths = zip(*(_packed(rows) for rows in (*prompts.values(), answers)), strict=True)
        output = system(ids[:-1], lengths[:-1], ids[-1], lengths[-1])
        output.loss.backward()
    return output.logits.detach(), gradients(system)


def _packed(rows):
    return rows[0].new_tensor([token for row in rows for token in row.tolist()]), [len(row) for row in rows]


@pytest.mark.parametrize("family", ["gemma3_text", "llama4_text", "deepseek_v3"])
def test_exact_but_for_what_the_model_rounds(family):
    """In float64 all the way to 1e-10; as it is, the model rounds m tokens at once otherwise than one by one."""
    for wide, tolerance in ((True, 1e-10), (False, 1e-5)):
        (logits, grads), (expected, wanted) = (step(family, b, wide) for b in (f"sweeps:{STEPS}", "exact"))
        assert error(logits, expected) <= tolerance
        assert_same(grads, wanted, tolerance)
