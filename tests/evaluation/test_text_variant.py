"""A run's own evaluation with texts in place of its trace."""

import json

import pytest

from diffmas import eval as evaluate
from diffmas import train
from diffmas.evaluation.evaluator import TEXT, VARIANTS
from diffmas.runs.files import RECORDS_FILE

SETTINGS = {"max_steps": 1, "eval_size": 4, "max_new_tokens": 2, "temperature": 0.0}


def records(folder):
    return [json.loads(line) for line in (folder / RECORDS_FILE).read_text().splitlines()]


def test_texts_beside_the_trace(flags, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(flags(**SETTINGS, max_message_tokens=3)) == 0
    assert TEXT["text"] in capsys.readouterr().out and TEXT["text"] in (run / "report.html").read_text()
    found = {variant: [r for r in records(run) if r["variant"] == variant] for variant in VARIANTS | TEXT}
    assert all(len(rows) == 4 for rows in found.values())
    for text, single, trained in zip(found["text"], found["single"], found["matched"], strict=True):
        assert 1 <= text["message_tokens"] <= 3 and text["latent_steps"] == 0
        assert single["message_tokens"] == trained["message_tokens"] == 0
        assert text["prefill_tokens"] > trained["prefill_tokens"] and text["prompt"] != single["prompt"]
    # As the method of that name does it.
    argv = [f"--run={run}", "--max_message_tokens=3", "--disable_tqdm=true"]
    assert evaluate.main([*argv, "--methods=text"]) == 0
    methods = [json.loads(line) for line in (run / "methods" / "items.jsonl").read_text().splitlines()]
    assert [r["answer"] for r in methods] == [r["answer"] for r in found["text"]]
    assert [r["prompt"] for r in methods] == [r["prompt"] for r in found["text"]]
    # Again with the finished run, in messages as long as answers where nothing else is asked for.
    assert evaluate.main([*argv, "--variants=text"]) == 0
    assert [r["answer"] for r in records(run / "eval")] == [r["answer"] for r in found["text"]]
    assert evaluate.main([*argv[:1], "--disable_tqdm=true", "--variants=text"]) == 0
    assert {r["message_tokens"] for r in records(run / "eval")} <= {1, 2}
    assert evaluate.main([*argv, "--variants=matched"]) == 2
    assert "max_message_tokens is 3 with variants 'matched', of which none talks in text" in capsys.readouterr().err


def test_no_texts_of_one_agent(flags, tmp_path, capsys):
    assert train.main(flags(**SETTINGS, topology="single", max_message_tokens=3)) == 0
    assert f"not evaluated: {TEXT['text']} (an agent alone receives no text)" in capsys.readouterr().out
    assert "accuracy_text" not in json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.mark.parametrize("value", [0, -1])
def test_messages_of_no_length(flags, value, capsys):
    assert train.main(flags(**SETTINGS, max_message_tokens=value)) == 2
    assert f"max_message_tokens is {value}; allowed: integers ≥ 1" in capsys.readouterr().err
