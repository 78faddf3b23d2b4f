"""The step's curves: measured, cut off and gone on with, fitted, drawn and put into a report, at sizes of a second."""

import contextlib
import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks import cases, ceilings, curves, step, unfinished
from benchmarks.memory import power_law


def _measure_all(path, seconds=0.01, **options):
    return curves.measure_all("cpu", path, seconds=seconds, small=True, **options)


def test_measured_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "STEP_AXES", {"latent": (0, 1, 3), "agents": (2, 3, 4)})
    shown = io.StringIO()
    data = _measure_all(tmp_path / "results.json", console=Console(file=shown, force_terminal=True, width=120))
    for result in (data["overhead"], *sum(data["curves"].values(), [])):
        assert result["label"] in shown.getvalue()
    curves.write(data, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(data))
    assert data["curves"].keys() == {"latent", "agents"} and unfinished.KEY not in data
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    report = (tmp_path / "report.md").read_text()
    assert "training step by latent steps m" in report and "training step by agents" in report
    for axis, results in data["curves"].items():
        assert [r["case"][axis] for r in results] == list(cases.STEP_AXES[axis])
        grown = curves.growth(axis, results, step.OURS, curves.memory)
        assert grown["exponent"] == pytest.approx(1, abs=0.1) and grown["r2"] > 0.99


class _Measured:
    """Stands in for `measure`: numbered results, Ctrl-C after `left` of them."""

    def __init__(self, left):
        self.labels, self.left = [], left

    def __call__(self, experiment, **_):
        if len(self.labels) == self.left:
            raise KeyboardInterrupt
        self.labels.append(experiment.case.label)
        return {"label": experiment.case.label, "number": len(self.labels)}


@pytest.fixture
def cut_off(monkeypatch, tmp_path):
    """An unfinished record of three measurements of five; how to go on."""
    monkeypatch.setattr(cases, "STEP_AXES", {"latent": (0, 1), "agents": (2, 3)})
    monkeypatch.setattr(step, "build", lambda case, device: SimpleNamespace(case=case))
    monkeypatch.setattr(ceilings, "measure", lambda *_: {})
    path = tmp_path / "runs" / "results.json"

    def run(left, **options):
        monkeypatch.setattr(curves, "measure", measured := _Measured(left))
        with pytest.raises(KeyboardInterrupt) if left < 5 else contextlib.nullcontext():
            return measured.labels, _measure_all(path, **options)
        return measured.labels, json.loads(path.read_text())

    first, data = run(3)
    assert len(first) == 3 and [len(c) for c in data["curves"].values()] == [2, 0]
    return path, run, first


def test_goes_on_where_it_was_cut_off(cut_off):
    path, run, first = cut_off
    again, data = run(1)
    assert len(data["curves"]["agents"]) == 1
    rest, data = run(5)
    everything = [data["overhead"], *data["curves"]["latent"], *data["curves"]["agents"]]
    assert [r["label"] for r in everything] == first + again + rest
    assert [r["number"] for r in everything] == [1, 2, 3, 1, 1]


def test_measures_anew_when_finished_or_told_to(cut_off):
    path, run, _ = cut_off
    labels, data = run(5, fresh=True)
    assert len(labels) == 5
    unfinished.save(path, data)
    assert len(run(5)[0]) == 5


def test_records_of_different_runs_do_not_mix(cut_off, monkeypatch):
    path, run, _ = cut_off
    before = path.read_text()
    with pytest.raises(ValueError, match="other seconds; allowed: .*--fresh"):
        run(5, seconds=0.02)
    with pytest.raises(ValueError, match="other cases;"):
        run(5, axes=["latent"])
    monkeypatch.setattr(unfinished, "_code", lambda: "edited")
    monkeypatch.setattr(unfinished.platform, "node", lambda: "elsewhere")
    with pytest.raises(ValueError, match="other code, host;"):
        run(5)
    assert path.read_text() == before


def test_growth_is_of_what_is_added():
    def result(agents):
        return {"case": {"agents": agents}, "contenders": [{"name": "x", "median_s": 7.0 + 3 * (agents - 2) ** 2}]}

    grown = curves.growth("agents", [result(n) for n in (2, 3, 4, 6)], "x", lambda c: c["median_s"])
    assert grown["exponent"] == pytest.approx(2) and grown["r2"] < 0.999
    assert power_law((1, 2, 4), (3, 12, 48))[0] == pytest.approx(2)
