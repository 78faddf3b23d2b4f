"""A few families of every kind against themselves recomputing what moved; `python -m benchmarks.models` walks all."""

import pytest

from benchmarks.models.comparison import EXACT, QUICK, REFUSED, check

#: Plain, biased, head norms, norms behind, interleaved and partly rotated heads, experts.
SERVED = [
    ("llama", "own"),
    ("qwen2", "own"),
    ("qwen3_moe", "own"),
    ("olmo2", "own"),
    ("glm4", "own"),
    ("ernie4_5_moe", "own"),
]
#: Layers without rotation; keys normalised behind it; inputs scaled inside the embedding.
NOT_YET = [("smollm3", "own"), ("exaone4", "full"), ("hunyuan_v1_dense", "own"), ("gemma", "own")]
UNSERVED = [
    ("gemma2", "full", "soft-capped attention"),
    ("gemma3_text", "own", "sliding-window attention"),
    ("gpt_oss", "full", "attention sinks"),
    ("granite", "own", "scaled logits"),
    ("bloom", "own", "ALiBi"),
    ("gpt2", "own", "rotary position embedding"),
]


def verdicts(family, layout):
    return {result.case: (result.verdict, result.error, result.where, result.why) for result in check(
        family, layout, QUICK)}  # fmt: skip


@pytest.mark.parametrize("family, layout", SERVED)
def test_exact(family, layout):
    found = verdicts(family, layout)
    assert len(found) == len(QUICK)
    assert not {case: result for case, result in found.items() if result[0] != EXACT}


@pytest.mark.xfail(strict=True, reason="keys are moved, or latent steps scaled, as these models do not")
@pytest.mark.parametrize("family, layout", NOT_YET)
def test_not_yet_exact(family, layout):
    test_exact(family, layout)


@pytest.mark.parametrize("family, layout, why", UNSERVED)
def test_refused_by_name(family, layout, why):
    found = verdicts(family, layout)
    assert len(found) == len(QUICK)
    assert not {case: result for case, result in found.items() if result[0] != REFUSED or why not in result[3]}
