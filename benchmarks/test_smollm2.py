"""A pretrained model against transformers: the training step and decoding, with the same gradients and tokens."""

import pytest

from benchmarks import generation, report, smollm2, step
from benchmarks.conftest import DEVICE

pytestmark = pytest.mark.skipif(smollm2.missing() is not None, reason=str(smollm2.missing()))


def _ids(cases):
    return [case.label.replace(" ", "_") for case in cases]


@pytest.mark.parametrize("case", smollm2.STEPS, ids=_ids(smollm2.STEPS))
def test_smollm2_step(compare, case):
    result = compare(smollm2.build_step(case, DEVICE), seconds=1.0)
    saved = {c["name"]: c["saved_bytes"] for c in result["contenders"] if "saved_bytes" in c}
    assert saved[step.CHECKPOINTED] <= saved[step.PEER] / 6


@pytest.mark.parametrize("case", smollm2.GENERATIONS, ids=_ids(smollm2.GENERATIONS))
def test_smollm2_decoding(compare, case, capsys):
    result = compare(smollm2.build_generation(case, DEVICE), seconds=1.0)
    ours, theirs = (report.contender(result, name) for name in (generation.OURS, generation.PEER))
    rates = [case.batch * case.new / c["median_s"] for c in (ours, theirs)]
    with capsys.disabled():
        print(
            f"\n{case.label}: all {case.batch * case.new} tokens equal; {rates[0]:.1f} tokens/s, "
            f"transformers {rates[1]:.1f}: {report.speedup(result):.2f} x"
        )
