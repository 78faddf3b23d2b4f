"""The training step against transformers' DynamicCache with SDPA, and how both grow."""

from dataclasses import replace

import pytest

from benchmarks import cases, curves, step
from benchmarks.conftest import DEVICE
from benchmarks.experiment import measure

_STEPS = cases.step_cases(DEVICE)


@pytest.mark.parametrize("case", _STEPS, ids=[c.label.replace(" ", "_") for c in _STEPS])
def test_step(compare, case):
    result = compare(step.build(case, DEVICE), seconds=1.0)
    saved = {c["name"]: c["saved_bytes"] for c in result["contenders"] if "saved_bytes" in c}
    if case == cases.FULL_STEP:
        assert saved[step.OURS] <= saved[step.PEER] / 8
        assert saved[step.CHECKPOINTED] <= saved[step.PEER] / 50


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU a call costs what its launches cost")
def test_step_of_single_tokens_costs_half_of_transformers(compare):
    result = compare(step.build(cases.OVERHEAD_STEP, DEVICE), seconds=2.0)
    times = {c["name"]: c["median_s"] for c in result["contenders"] if "median_s" in c}
    assert times[step.OURS] <= 0.5 * times[step.PEER]


@pytest.mark.parametrize("axis", cases.STEP_AXES)
def test_step_grows(compare, clock, request, axis):
    *values, last = cases.STEP_AXES[axis]
    results = [
        measure(step.build(replace(cases.STEP_BASE, **{axis: value}), DEVICE), seconds=0.5, clock=clock)
        for value in values
    ]
    results.append(compare(step.build(replace(cases.STEP_BASE, **{axis: last}), DEVICE), seconds=0.5))
    request.config.stash[curves.STASH][axis] = results
    for name in (step.OURS, step.CHECKPOINTED):
        assert 0.95 < curves.growth(axis, results, name, curves.memory)["exponent"] < 1.05
