"""The step's curves: measured, fitted, drawn and put into a report, at sizes that take a second."""

import json

import pytest

from benchmarks import cases, curves, step
from benchmarks.memory import power_law


def test_measured_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "STEP_AXES", {"latent": (0, 1, 3), "agents": (2, 3, 4)})
    data = curves.measure_all("cpu", seconds=0.01, small=True)
    curves.write(data, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["curves"].keys() == {"latent", "agents"}
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    report = (tmp_path / "report.md").read_text()
    assert "training step by latent steps m" in report and "training step by agents" in report
    for axis, results in data["curves"].items():
        assert [r["case"][axis] for r in results] == list(cases.STEP_AXES[axis])
        grown = curves.growth(axis, results, step.OURS, curves.memory)
        assert grown["exponent"] == pytest.approx(1, abs=0.1) and grown["r2"] > 0.99


def test_growth_is_of_what_is_added():
    def result(agents):
        return {"case": {"agents": agents}, "contenders": [{"name": "x", "median_s": 7.0 + 3 * (agents - 2) ** 2}]}

    grown = curves.growth("agents", [result(n) for n in (2, 3, 4, 6)], "x", lambda c: c["median_s"])
    assert grown["exponent"] == pytest.approx(2) and grown["r2"] < 0.999
    assert power_law((1, 2, 4), (3, 12, 48))[0] == pytest.approx(2)
