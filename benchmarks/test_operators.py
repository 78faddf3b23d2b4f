"""Every operator: our backends against `reference` and against what a user would run instead."""

import pytest

from benchmarks import cases, operators
from benchmarks.conftest import DEVICE

_ALL = [(case, direction) for case in cases.operator_cases(DEVICE) for direction in operators.directions(case)]


@pytest.mark.parametrize(
    ("case", "direction"), _ALL, ids=[f"{type(c).__name__} {d}: {c.label}".replace(" ", "_") for c, d in _ALL]
)
def test_operator(compare, case, direction):
    compare(operators.build(case, direction, DEVICE), seconds=0.5)
