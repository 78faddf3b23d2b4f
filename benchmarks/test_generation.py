"""Decoding against transformers' `generate`: the same tokens, and how fast they come."""

import pytest

from benchmarks import generation, report
from benchmarks.conftest import DEVICE


@pytest.mark.parametrize("case", generation.CASES, ids=[c.label.replace(" ", "_") for c in generation.CASES])
def test_generation(compare, case, capsys):
    result = compare(generation.build(case, DEVICE), seconds=4.0)
    ours, theirs = (report.contender(result, name) for name in (generation.OURS, generation.PEER))
    rates = [case.batch * case.new / c["median_s"] for c in (ours, theirs)]
    with capsys.disabled():
        print(
            f"\n{case.label}: all {case.batch * case.new} tokens equal; {rates[0]:.0f} tokens/s, "
            f"transformers {rates[1]:.0f}: {report.speedup(result):.2f} x"
        )
    if case == generation.CASES[-1]:
        assert report.speedup(result) >= 2
