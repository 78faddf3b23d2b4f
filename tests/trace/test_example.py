"""The example of the documentation does what it says."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "docs" / "trace_example.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("trace_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns(example):
    losses = example.train()
    assert losses[0] > 1.5 and losses[-1] < 0.1


def test_it_cannot_learn_without_the_trace(example, monkeypatch):
    monkeypatch.setattr(example, "cached_attention", lambda q, k, v, call, layer: 0 * q)
    assert example.train()[-1] > 1.5


def test_it_is_short_and_free_of_transformers():
    text = PATH.read_text()
    assert len(text.splitlines()) <= 40 and "transformers" not in text
