"""The training and evaluation programs: what they write, refuse, save on Ctrl-C and resume to the bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from diffmas import eval as evaluate
from diffmas import train
from diffmas.evaluation.records import read_records
from diffmas.loading import load_run
from diffmas.runs.files import ADAPTER_FILE

ACCURACIES = {"accuracy", *(f"accuracy_{v}" for v in ("mismatched", "zero", "noise", "training_free", "single"))}


def adapter(folder):
    return load_file(Path(folder, ADAPTER_FILE))


def assert_same_weights(a, b):
    a, b = adapter(a), adapter(b)
    assert a.keys() == b.keys() and a
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alignment": "learned"},
        {"alignment": "soft", "alignment_temperature_learned": True, "latent_grad_clip": 2.0, "bf16": True},
        {"alignment": "soft", "alignment_top_k": 5},
        {"detach_trace": True},
        {"checkpointing": "prefill"},
    ],
    ids=str,
)
def test_run_folder(flags, tmp_path, changes):
    assert train.main(flags(**changes)) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= ACCURACIES | {"seconds", "peak_memory_mb"}
    assert all(0 <= summary[name] <= 1 for name in ACCURACIES)
    records = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert len(records) == 6 * 9
    matched = [r for r in records if r["variant"] == "matched"]
    assert summary["accuracy"] == sum(r["correct"] for r in matched) / 9
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 6
    assert "<svg" in (run / "report.html").read_text()
    learned = changes.get("alignment") == "learned" or "alignment_temperature_learned" in changes
    assert (run / "alignment.safetensors").exists() == learned


def test_adapter_loads_in_stock_peft(flags, base, tmp_path):
    assert train.main(flags()) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    loaded = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    saved = adapter(tmp_path / "run")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert any(saved[name].any() for name in saved if "lora_B" in name)


def test_eval_repeats_the_run_s_own_accuracies(flags, tmp_path, capsys):
    assert train.main(flags(alignment="learned")) == 0
    assert evaluate.main([f"--run={tmp_path / 'run'}", "--batch_size=2", "--seed=42"]) == 0
    before, after = (json.loads((tmp_path / "run" / p / "summary.json").read_text()) for p in (".", "eval"))
    assert {k: before[k] for k in ACCURACIES} == {k: after[k] for k in ACCURACIES}
    records = [read_records(tmp_path / "run" / p / "eval.jsonl") for p in (".", "eval")]
    # A mismatched trace is another row of the batch, so that variant depends on the batch size; no other does.
    a, b = ([(*r.key, r.prompt, r.answer) for r in rows if r.control != "mismatched"] for rows in records)
    assert a == b


def test_resume_is_bit_identical(flags, tmp_path):
    assert train.main(flags(output_dir=tmp_path / "whole", disable_final_eval=True)) == 0
    assert train.main(flags(output_dir=tmp_path / "parts", disable_final_eval=True)) == 0
    for name in (ADAPTER_FILE, "summary.json"):
        (tmp_path / "parts" / name).unlink()
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    assert train.main(flags(output_dir=None, resume_from_checkpoint=checkpoint, disable_final_eval=True)) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    metrics = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "parts")]
    losses = [[(e["step"], e["loss"]) for e in map(json.loads, lines) if "loss" in e] for lines in metrics]
    assert losses[0] == losses[1]


def test_ctrl_c_saves_and_resume_goes_on(flags, tmp_path):
    whole = flags(output_dir=tmp_path / "whole", max_steps=30, save_steps=1000, disable_final_eval=True)
    assert train.main(whole) == 0
    run = tmp_path / "run"
    command = flags(max_steps=30, save_steps=1000, logging_steps=1, disable_final_eval=True)
    process = subprocess.Popen([sys.executable, "-m", "diffmas.train", *command], stdout=subprocess.PIPE, text=True)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and (not metrics.is_file() or not metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert f"--resume_from_checkpoint {run}" in output
    assert not (run / "summary.json").exists()
    assert train.main([*command, f"--resume_from_checkpoint={run}"]) == 0
    assert_same_weights(tmp_path / "whole", run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_steps": -1}, "latent_steps is -1; allowed: integers ≥ 0"),
        ({"topology": "ring"}, "topology is 'ring'; allowed: sequential"),
        ({"topology": "nowhere.yaml"}, "topology is 'nowhere.yaml': no such file"),
        ({"task": "nowhere.jsonl"}, "no such file"),
        ({"handover": "half"}, "handover is 'half'; allowed: full, latent"),
        ({"alignment": "magic"}, "alignment is 'magic'"),
        ({"checkpointing": "some"}, "checkpointing is 'some'"),
        ({"latent_backward": "sweeps:0"}, "latent_backward is 'sweeps:0'; allowed: exact, or sweeps:k"),
        ({"gradient_checkpointing": True}, "--checkpointing"),
        ({"backend": "cuda"}, "backend 'cuda' cannot run"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"quantization": "3bit"}, "quantization is '3bit'; allowed: none, 4bit"),
        ({"quantization": "4bit", "random_weights": True}, "with random_weights; allowed: none"),
        ({"dtype": "float16"}, "allowed: --bf16 True or --dtype bfloat16"),
        ({"bf16": True, "dtype": "float32"}, "bf16 is True and dtype is 'float32'; allowed: auto, bfloat16"),
        ({"fp16": True}, "fp16 is True; allowed: --bf16 True"),
        ({"lora_r": 0}, "lora_r is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"per_device_eval_batch_size": 1}, "batch_size is 1"),
        ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint is 'nowhere'"),
    ],
)
def test_bad_values_are_named(flags, tmp_path, capsys, changes, message):
    assert train.main(flags(**changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_finished_run_is_not_overwritten(flags, tmp_path, capsys):
    assert train.main(flags(disable_final_eval=True)) == 0
    before = adapter(tmp_path / "run")
    assert train.main(flags()) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert adapter(tmp_path / "run").keys() == before.keys()


def test_resume_with_another_system_is_refused(flags, tmp_path, capsys):
    assert train.main(flags(disable_final_eval=True)) == 0
    assert train.main(flags(resume_from_checkpoint=tmp_path / "run", latent_steps=3)) == 2
    assert "latent_steps is 3, but the run to go on with had 2" in capsys.readouterr().err


def test_unknown_flags_get_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--latent_stepz=3"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--latent_stepz" in error and "did you mean --latent_steps" in error and error.count("\n") == 1


def test_flags_are_given_in_full(capsys):
    """A shortened `--config` would be parsed, and its file never read."""
    with pytest.raises(SystemExit):
        train.main(["--conf=nowhere.yaml", "--max_steps=1"])
    assert "unrecognized arguments: --conf=nowhere.yaml" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(flags, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train.main(flags(output_dir=tmp_path / "file")) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_config_file_and_flags_win_over_presets(flags, tmp_path):
    (tmp_path / "run.yaml").write_text("latent_steps: 1\nlearning_rate: 2e-2\nlora_rank: 4\n")
    given = [f for f in flags(lora_r=3) if not f.startswith(("--latent_steps", "--learning_rate"))]
    assert train.main([*given, f"--config={tmp_path / 'run.yaml'}"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["system"]["latent_steps"], summary["system"]["lora_r"]) == (1, 3)


def test_config_file_with_unknown_keys(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("latent_stepz: 1\n")
    with pytest.raises(SystemExit):
        train.main([f"--config={tmp_path / 'run.yaml'}"])
    assert "unknown arguments ['latent_stepz']" in capsys.readouterr().err


def test_eval_of_something_that_is_no_run(tmp_path, capsys):
    assert evaluate.main([f"--run={tmp_path}"]) == 2
    assert "has no system.json" in capsys.readouterr().err


def test_load_run_gives_the_trained_system(flags, tmp_path):
    assert train.main(flags(topology="relay", handover="full", disable_final_eval=True)) == 0
    run = load_run(tmp_path / "run")
    assert (run.system.topology.handover, run.system.latent_steps) == ("full", 2)


def test_gsm8k_from_a_local_folder_trains_and_evaluates(flags, tmp_path):
    items = [
        {"question": f"{i} + {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"} for i in range(9)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    changes = dict(task="gsm8k", data_dir=tmp_path, topology="sequential", handover=None, max_steps=2, max_new_tokens=4)
    assert train.main(flags(**changes)) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval_items"] == 9


def test_bf16_means_a_bfloat16_base_under_a_float32_adapter(flags, tmp_path):
    assert train.main(flags(bf16=True, alignment="learned", disable_final_eval=True)) == 0
    run = load_run(tmp_path / "run")
    assert (run.args.dtype, run.system.agent_model.language_model.dtype) == ("bfloat16", torch.bfloat16)
    trained = {p.dtype for p in run.system.parameters() if p.requires_grad}
    saved = adapter(tmp_path / "run") | load_file(tmp_path / "run" / "alignment.safetensors")
    assert trained == {t.dtype for t in saved.values()} == {torch.float32}
