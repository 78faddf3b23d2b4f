"""What is not finite stops a training at that step, keeps the checkpoints before it, and is never written as JSON."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from diffmas import eval as evaluate
from diffmas import train
from diffmas.evaluation.records import Record, RecordFile, read_records
from diffmas.evaluation.report import write_records, write_summary
from diffmas.runs.files import ADAPTER_FILE
from diffmas.support.valid_json import to_json
from diffmas.training.trainer import SystemTrainer


@pytest.fixture
def failed(flags, tmp_path, capsys):
    """`failed(**changes)`: the line a run of two micro-batches a step ends with."""

    def line(**changes):
        assert train.main(flags(**dict(save_steps=1, logging_steps=1) | changes)) == 2
        assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / ADAPTER_FILE).exists()
        (error,) = (e for e in capsys.readouterr().err.splitlines() if "error: " in e)
        return error.removeprefix("python -m diffmas.train: error: ")

    return line


def spoil(monkeypatch, at, change):
    """The loss of micro-batch `at`, counted from 1, becomes `change(loss)`."""
    compute, seen = SystemTrainer.compute_loss, []

    def spoiled(*args, **kwargs):
        loss = compute(*args, **kwargs)
        seen.append(loss)
        return change(loss) if len(seen) == at else loss

    monkeypatch.setattr(SystemTrainer, "compute_loss", spoiled)
    return seen


def saved(folder):
    return sorted(p.name for p in folder.glob("checkpoint-*"))


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (1, lambda loss: loss * math.nan, "step 1: the loss of micro-batch 1 of 2 is nan; stopped before its update"),
        (6, lambda loss: loss * math.nan, "step 3: the loss of micro-batch 2 of 2 is nan; "),
        (5, lambda loss: loss + math.inf, "step 3: the loss of micro-batch 1 of 2 is inf; "),
        (5, lambda loss: loss - math.inf, "step 3: the loss of micro-batch 1 of 2 is -inf; "),
        # A finite loss with a gradient that is not: its factor overflows on the way back.
        (5, lambda loss: loss + 0 * (loss * 1e-30).sqrt().mul(0).sqrt(), "step 3: the gradient norm is nan; "),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [0, 1])
def test_the_first_step_that_is_not_finite(failed, tmp_path, monkeypatch, at, change, message, max_grad_norm):
    seen = spoil(monkeypatch, at, change)
    assert failed(max_grad_norm=max_grad_norm).startswith(message)
    step = (at + 1) // 2
    assert len(seen) == 2 * step
    run = tmp_path / "run"
    assert saved(run) == [f"checkpoint-{i}" for i in range(1, step)]
    assert [e["step"] for e in lines(run / "metrics.jsonl") if "loss" in e] == list(range(1, step))


def test_gradients_whose_norm_overflows(failed, tmp_path, monkeypatch):
    """All gradients are finite, and clipping to a norm over infinity would make them zero."""
    spoil(monkeypatch, 3, lambda loss: loss * 3e37 / loss.detach())
    assert failed(learning_rate=1e-30).startswith("step 2: the gradient norm is inf; ")
    assert saved(tmp_path / "run") == ["checkpoint-1"]


@pytest.mark.parametrize("changes", [{}, dict(alignment="learned"), dict(max_grad_norm=0)], ids=str)
def test_an_update_that_is_not_finite_is_not_saved(failed, tmp_path, changes):
    error = failed(learning_rate=1e38, lr_scheduler_type="linear", warmup_steps=1, **changes)
    # The first rate is 0.
    assert error.startswith("step 2: ") and "is not finite after the update; stopped before it was saved" in error
    assert saved(tmp_path / "run") == ["checkpoint-1"]


def test_the_last_checkpoint_is_good_and_resumes(failed, flags, tmp_path, monkeypatch):
    with monkeypatch.context() as spoiled:
        spoil(spoiled, 10, lambda loss: loss * math.nan)
        assert failed().startswith("step 5: ")
    run = tmp_path / "run"
    assert all(value.isfinite().all() for value in load_file(run / "checkpoint-4" / ADAPTER_FILE).values())
    again = dict(save_steps=1, logging_steps=1, disable_final_eval=True)
    assert train.main(flags(**again, resume_from_checkpoint=run)) == 0
    assert train.main(flags(**again, output_dir=tmp_path / "whole")) == 0
    a, b = (load_file(folder / ADAPTER_FILE) for folder in (run, tmp_path / "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.fixture
def broken(base, tmp_path):
    """A base whose states are NaN."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].self_attn.q_norm.weight.data.fill_(math.nan)
    folder = tmp_path / "broken"
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tmp_path.__class__(base) / file).read_bytes())
    return folder


def test_a_base_that_is_not_finite(failed, broken):
    assert failed(model=broken).startswith("step 1: the loss of micro-batch 1 of 2 is nan; ")


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_answer_is_made_up(flags, base, broken, tmp_path, capsys, temperature):
    """Not in an evaluation while training, nor in one by itself."""
    asked = dict(temperature=temperature, eval_on_start=True, max_steps=1)
    assert train.main(flags(model=broken, **asked)) == 2
    assert "error: the model's logits are not finite" in capsys.readouterr().err
    if temperature == 0:
        assert train.main(flags(max_steps=1, disable_final_eval=True, output_dir=tmp_path / "good")) == 0
        description = json.loads((tmp_path / "good" / "system.json").read_text())
        description["system"]["model_name_or_path"] = str(broken)
        (tmp_path / "good" / "system.json").write_text(json.dumps(description))
        assert evaluate.main([f"--run={tmp_path / 'good'}", "--disable_tqdm"]) == 2
        assert "error: the model's logits are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_is_valid_whatever_is_written(tmp_path, value):
    assert json.loads(to_json({"a": [value, 1.5, (value, "NaN")], "b": {"c": value}}), parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None, "NaN"]], "b": {"c": None},
    }  # fmt: skip
    record = Record(
        task="t", method="trained", control="matched", seed=0, index=0, sample=0, prompt="", answer="", gold="",
        extracted=None, correct=False, tokens=1, message_tokens=0, latent_steps=0, prefill_tokens=0,
        entropies=[value], logprob=value, finish="stop", seconds=1.0,
    )  # fmt: skip
    with RecordFile(tmp_path / "items.jsonl") as file:
        file.append([record])
    assert lines(tmp_path / "items.jsonl")[0]["logprob"] is None and len(read_records(tmp_path / "items.jsonl")) == 1
    write_records(tmp_path, [record])
    assert lines(tmp_path / "eval.jsonl")[0]["entropies"] == [None]
    write_summary(tmp_path, {"accuracy": value})
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail) == {"accuracy": None}


def test_json_of_a_run_is_valid(flags, tmp_path):
    assert train.main(flags(profile=True)) == 0
    run = tmp_path / "run"
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert lines(run / name)
    for name in ("summary.json", "system.json", "profile.json", "trace.json", "checkpoint-6/trainer_state.json"):
        json.loads((run / name).read_text(), parse_constant=pytest.fail)
