"""Batches by length, the automatic micro-batch and the automatic checkpointing, through the training program."""

import json
import re

import torch

from diffmas import train
from diffmas.runs.files import ADAPTER_FILE
from diffmas.training.trainer import SystemTrainer


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def test_auto_batch_keeps_the_global_batch(flags, tmp_path, capsys):
    """Plenty of memory: one micro-batch for the eight rows that four steps of two would take; nothing recomputed."""
    changes = dict(max_steps=2, disable_final_eval=True, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert train.main(flags(**changes, output_dir=tmp_path / "plain")) == 0
    auto = flags(**changes, auto_batch=True, memory_limit_gb=4, checkpointing="auto", train_size=300)
    assert train.main(auto) == 0
    found = summary(tmp_path / "run")["fit"]
    assert (found["rows"], found["checkpointing"], found["budget"] <= 4e9) == (8, "none", True)
    assert "micro-batch 8 × 1 accumulation steps" in capsys.readouterr().out
    plain, run = ([json.loads(x) for x in (tmp_path / n / "metrics.jsonl").open()] for n in ("plain", "run"))
    assert plain[-1]["step"] == run[-1]["step"] == 2


def test_too_little_memory_is_said_before_anything_is_written(flags, tmp_path, capsys):
    assert train.main(flags(auto_batch=True, memory_limit_gb=1e-6, train_size=300)) == 2
    assert "do not fit" in capsys.readouterr().err
    assert train.main(flags(auto_batch=True, memory_limit_gb=-1, train_size=300)) == 2
    assert "memory_limit_gb is -1.0; allowed: > 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_grouped_batches_resume_to_the_bit(flags, tmp_path):
    changes = dict(train_sampling_strategy="group_by_length", train_size=20, disable_final_eval=True)
    runs = [tmp_path / "whole", tmp_path / "parts"]
    for run in runs:
        assert train.main(flags(**changes, output_dir=run)) == 0
    (runs[1] / ADAPTER_FILE).unlink()
    checkpoint = runs[1] / "checkpoint-4"
    assert train.main(flags(**changes, output_dir=None, resume_from_checkpoint=checkpoint)) == 0
    assert (runs[0] / ADAPTER_FILE).read_bytes() == (runs[1] / ADAPTER_FILE).read_bytes()


def test_out_of_memory_suggests_what_helps(flags, monkeypatch, capsys):
    def compute_loss(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(SystemTrainer, "compute_loss", compute_loss)
    assert train.main(flags()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search("out of memory .*micro-batch of 4 rows .*--auto_batch.*tried to allocate 2 GiB", said)
