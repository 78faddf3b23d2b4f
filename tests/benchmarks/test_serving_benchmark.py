"""The benchmark of serving goes on cell by cell, compares before it says how fast, and renders what it kept."""

import json

import pytest

from benchmarks import serving, unfinished
from benchmarks.experiment import WrongResult

SIZES, OF = [(1, 4), (2, 4)], dict(code="toy", device="toy", torch="t", transformers="t", vllm="v")


def apart(seconds, wrong=(), cut_after=99):
    """Engines as they would measure; those that are `wrong` come to other tokens."""
    done = []

    def measured(engine, dtype, weights, sizes):
        for batch, new in sizes:
            if len(done) == cut_after:
                raise KeyboardInterrupt
            done.append((engine, dtype, batch, new))
            tokens = [f"{dtype}-{engine if engine in wrong else ''}{row}" for row in range(batch)]
            yield dict(
                engine=engine, dtype=dtype, batch=batch, new=new, processor_s=seconds[engine], wall_s=9, tokens=tokens
            )

    return measured, done


def collect(path, measured, of=OF):
    return serving.collect(path, [(dtype, SIZES) for dtype in serving.DTYPES], of, "", measured)


def test_goes_on_and_renders(tmp_path, monkeypatch):
    path, seconds = tmp_path / "results.json", {"diffmas": 2.0, "vllm": 1.0, "transformers": 4.0}
    measured, first = apart(seconds, cut_after=5)
    with pytest.raises(KeyboardInterrupt):
        collect(path, measured)
    assert "| float32 | 1 | 64 | not measured |" in serving.table(json.loads(path.read_text()))
    with pytest.raises(ValueError, match="unfinished record of a run with other code"):
        collect(path, measured, OF | {"code": "other"})
    measured, second = apart(seconds)
    results = collect(path, measured)
    assert len(first) == 5 and not set(first) & set(second) and len(first + second) == 2 * 2 * 3
    assert unfinished.KEY not in results and len(json.loads(path.read_text())["cells"]) == len(results["cells"]) == 12
    monkeypatch.setattr(serving, "BATCHES", (1, 2))
    monkeypatch.setattr(serving, "NEW", (4, 512))
    text = serving.table({**results, "vllm": "v", "machine": dict(device="toy", torch="t", transformers="t")})
    assert "| float32 | 2 | 4 | 4.0 | 8.0 | 2.0 | 0.50 × | 2.00 × | 2 of 2 |" in text
    assert text.count("| not measured | not measured | not measured |") == 4


def test_no_time_without_the_same_tokens(tmp_path):
    measured, _ = apart(dict.fromkeys(serving.ENGINES, 1.0), wrong=["vllm"])
    with pytest.raises(WrongResult, match="vllm, 1 answers of 4 tokens: 1 are others"):
        collect(tmp_path / "results.json", measured)
