"""The training step against transformers' DynamicCache with SDPA."""

import pytest

from benchmarks import cases, step
from benchmarks.conftest import DEVICE

_STEPS = cases.step_cases(DEVICE)


@pytest.mark.parametrize("case", _STEPS, ids=[c.label.replace(" ", "_") for c in _STEPS])
def test_step(compare, case):
    result = compare(step.build(case, DEVICE), seconds=1.0)
    saved = {c["name"]: c["saved_bytes"] for c in result["contenders"] if "saved_bytes" in c}
    if case == cases.FULL_STEP:
        assert saved[step.OURS] <= 0.3 * saved[step.PEER]
        assert saved[step.CHECKPOINTED] <= saved[step.PEER] / 50
