"""A few families of every kind against themselves recomputing what moved; `python -m benchmarks.models` walks all."""

import pytest

from benchmarks.models.comparison import EXACT, QUICK, REFUSED, check

#: Plain, biased, head norms, norms behind, interleaved and partly rotated heads, experts; layers without rotation,
#: windows and chunks, two kinds of frequencies, sinks and caps, scaled inputs and logits, values smaller than keys,
#: layers that keep their keywords to themselves, layers that attend twice.
SERVED = [
    ("llama", "own"),
    ("qwen2", "own"),
    ("qwen3_moe", "own"),
    ("olmo2", "own"),
    ("glm4", "own"),
    ("smollm3", "own"),
    ("cohere2", "own"),
    ("llama4_text", "own"),
    ("gemma", "own"),
    ("gemma2", "own"),
    ("gemma3_text", "own"),
    ("gpt_oss", "own"),
    ("granite", "own"),
    ("phi3", "own"),
    ("longcat_flash", "own"),
    ("deepseek_v3", "own"),
    ("stablelm", "own"),
]
#: Exact where nothing moves, refused where something does.
CHAINS = [
    ("hunyuan_v1_dense", "own", "keys cannot be moved, in layer 0: no rotation explains"),
    ("gpt2", "own", "keys cannot be moved, in layer 0: no rotation explains"),
    ("qwen3_next", "own", "recurrent layers"),
    ("falcon_h1", "own", "recurrent layers"),
    ("granitemoehybrid", "own", "recurrent layers"),
]
UNSERVED = [
    ("bloom", "own", "ALiBi"),
    ("diffllama", "own", "attends more than once"),
    ("bart", "own", "something else through a trace"),
    ("minimax_m3_vl_text", "own", "an indexer chooses"),
]


def verdicts(family, layout):
    return {result.case: (result.verdict, result.error, result.where, result.why) for result in check(
        family, layout, QUICK)}  # fmt: skip


@pytest.mark.parametrize("family, layout", SERVED)
def test_exact(family, layout):
    found = verdicts(family, layout)
    assert len(found) == len(QUICK)
    assert not {case: result for case, result in found.items() if result[0] != EXACT}


@pytest.mark.parametrize("family, layout, why", CHAINS)
def test_exact_in_chains(family, layout, why):
    """The chain is exact, decoding in another topology or training one is refused, and says why."""
    found = verdicts(family, layout)
    chains = [case for case in found if "sequential" in case]
    assert chains and all(found[case][0] == EXACT for case in chains)
    others = [result for case, result in found.items() if case not in chains]
    assert len(others) == len(QUICK) - len(chains)
    assert not [result for result in others if result[0] != REFUSED or why not in result[3]]


@pytest.mark.parametrize("family, layout, why", UNSERVED)
def test_refused_by_name(family, layout, why):
    found = verdicts(family, layout)
    assert len(found) == len(QUICK)
    assert not {case: result for case, result in found.items() if result[0] != REFUSED or why not in result[3]}
