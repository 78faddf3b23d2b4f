"""The benchmark of all methods: the page gets the table once, and a result is drawn from its summary alone."""

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


def test_the_page_gets_the_section_once(summary, tmp_path, monkeypatch):
    page = tmp_path / "methods.md"
    page.write_text(methods.PAGE.read_text())
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(methods, "PAGE", page)
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "results")
    first, _, rest = page.read_text().partition(methods.BEGIN)
    around = first + rest.partition(methods.END_MARK)[2]
    methods.render(summary)
    once = page.read_text()
    assert once.count(methods.BEGIN) == once.count(methods.END_MARK) == 1
    assert "| latent steps, no training (`latent`) | 75.0 [" in once and "| `latent` | +50.0 [" in once
    assert "4 of relay" in once and "2.5 minutes; a processor" in once
    methods.render(summary)
    assert page.read_text() == once and (tmp_path / "results" / "methods.png").stat().st_size > 5000
    assert all(line in once for line in around.splitlines())
