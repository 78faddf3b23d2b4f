"""The comparisons of methods: the page gets the table once, and a result is drawn from its summary alone."""

from dataclasses import replace

import pytest

from benchmarks import compared, language, methods
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


@pytest.mark.parametrize("study", [methods.STUDY, language.STUDY], ids=lambda s: s.name)
def test_the_page_gets_the_section_once(study, summary, tmp_path, monkeypatch):
    page = tmp_path / "methods.md"
    page.write_text(compared.PAGE.read_text())
    monkeypatch.setattr(compared, "PAGE", page)
    monkeypatch.setattr(compared, "ROOT", tmp_path)
    study.results.mkdir(parents=True)
    begin, end = (f"<!-- {study.name}: {word} -->" for word in ("begin", "end"))
    first, _, rest = page.read_text().partition(begin)
    around = first + rest.partition(end)[2]
    compared.render(study, summary)
    once = page.read_text()
    assert once.count(begin) == once.count(end) == 1
    assert "| latent steps, no training (`latent`) | 75.0 [" in once and "| `latent` | +50.0 [" in once
    assert "4 of relay" in once and "2.5 minutes; a processor" in once
    compared.render(study, summary)
    assert page.read_text() == once and (study.results / f"{study.name}.png").stat().st_size > 5000
    assert all(line in once for line in around.splitlines())


def test_whether_text_does_better_comes_first(summary):
    records = [
        replace(ONE, method=method, index=i, correct=i < right)
        for method, right in (("single+sft", 3), ("text+sft", 1), ("diffmas", 2))
        for i in range(4)
    ]
    said = language.against_text(summarise(records, ["single+sft", "text+sft", "diffmas"]))
    assert said.startswith("`diffmas` loses to `single+sft` on relay: relay -25.0 [")
    assert "`diffmas` does not lose to `text+sft`: relay +25.0 [" in said


def test_results_name_no_place_of_a_machine():
    kept = compared.portable(
        {"task": {"data_dir": "/some/where/svamp", "task": "svamp"}, "cells": [{"n": 1, "x": None}]}
    )
    assert kept == {"task": {"data_dir": "svamp", "task": "svamp"}, "cells": [{"n": 1, "x": None}]}
