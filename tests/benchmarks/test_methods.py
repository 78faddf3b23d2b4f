"""The benchmark of all methods: README gets the table once, and a result is drawn from its summary alone."""

from dataclasses import replace

import pytest

from benchmarks import methods
from diffmas.comparison.summary import summarise
from diffmas.evaluation.records import Record

ONE = Record("relay", "latent", "matched", 0, 0, 0, "p", "1", "1", "1", True, 1, 0, 4, 9, [0.5], -0.5, "stop", 0.1)
MACHINE = {"device": "a processor", "threads": 2, "torch": "2", "transformers": "5"}


@pytest.fixture
def summary():
    right = {"matched": [1, 1, 0, 1], "mismatched": [0, 0, 0, 1]}
    records = [
        replace(ONE, control=control, seed=seed, index=i, correct=bool(c))
        for control, values in right.items()
        for seed in (0, 1)
        for i, c in enumerate(values)
    ]
    return summarise(records, ["latent"]) | {"minutes": 2.5, "machine": MACHINE}


def test_readme_gets_the_section_once(summary, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text((methods.Path(methods.__file__).parents[1] / "README.md").read_text())
    first, _, rest = readme.read_text().partition(methods.BEGIN)
    around = first + rest.partition(methods.END_MARK)[2]
    methods.render(summary)
    once = readme.read_text()
    assert once.count(methods.BEGIN) == once.count(methods.END_MARK) == 1
    assert "| latent steps, no training (`latent`) | 75.0 [" in once and "| `latent` | +50.0 [" in once
    assert "4 of relay" in once and "2.5 minutes; a processor" in once
    methods.render(summary)
    assert readme.read_text() == once and (tmp_path / "methods.png").stat().st_size > 5000
    assert all(line in once for line in around.splitlines())
