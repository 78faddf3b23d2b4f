"""The oracle that recomputes: against plain forwards, against rotated caches where those are right, and where not."""

import copy

import oracle as rotated
import pytest
import torch
from compare import assert_same, error, gradients

from benchmarks.models import oracle
from benchmarks.models.comparison import DAGS, oracle_failures, ragged
from benchmarks.models.configurations import causal_lm
from benchmarks.models.precision import widened

TOLERANCE = 1e-10


def run(batch, model, dag, **options):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    prompts, answers = ragged(list(dag))
    with widened():
        loss, logits = batch(model, dag, prompts, answers, latent_steps=2, **options)
        loss.backward()
    return loss.detach(), logits.detach(), gradients(model)


@pytest.mark.parametrize("detach", [False, True], ids=["", "detach"])
@pytest.mark.parametrize("topology, handover", [("stitch", "full"), ("stitch", "latent"), ("sequential", "full")])
def test_rotated_caches_agree_where_every_layer_rotates(topology, handover, detach):
    model = causal_lm("llama", "own")
    options = dict(handover=handover, detach=detach)
    loss, logits, grads = run(oracle.batch, model, DAGS[topology], **options)
    expected = run(rotated.batch, model, DAGS[topology], **options)
    assert error(loss, expected[0]) <= TOLERANCE
    assert error(logits, expected[1]) <= TOLERANCE
    assert_same(grads, expected[2], TOLERANCE)


@pytest.mark.parametrize("family", ["smollm3", "hunyuan_v1_dense"])
def test_rotated_caches_are_wrong_where_layers_turn_keys_otherwise(family):
    model = causal_lm(family, "own")
    logits, expected = (
        run(batch, model, DAGS["stitch"], handover="full")[1] for batch in (oracle.batch, rotated.batch)
    )
    assert error(logits, expected) > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("layout", ["own"])
def test_a_prefix_in_its_own_place_changes_nothing(family, layout):
    assert oracle_failures(causal_lm(family, layout)) == {}


def test_a_segment_that_moves_does_change_something():
    model = causal_lm("llama", "own")
    with widened(), torch.no_grad():
        recomputed = oracle.RecomputedModel(model)
        embeds = recomputed.embedding(torch.arange(12))
        _, _, inputs, axis = recomputed.read([], embeds[:7])
        tail = oracle.Segment(embeds[:7], inputs, 3, axis).handed_over("latent")
        logits = recomputed.read([tail], embeds[7:])[1]
        alone = recomputed.read([], embeds[3:])[1][4:]
    assert error(logits, alone) > 1e-3


def test_float32_is_float64_within():
    with widened():
        x = torch.ones(2)
        assert x.dtype == torch.float64
        assert x.float().dtype == x.to(torch.float32).dtype == torch.float64
        assert torch.softmax(x, -1, dtype=torch.float32).dtype == torch.float64
    assert torch.ones(2).dtype == torch.float32
