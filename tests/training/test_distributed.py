"""Two processes, data parallel and sharded (FSDP2), against one: gradients, checkpoints, evaluation, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_processes
from compare import assert_same, error
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from diffmas import eval as evaluate
from diffmas import train
from diffmas.command_line import parse_training
from diffmas.evaluation.records import read_records
from diffmas.training import session

KINDS = ["ddp", "fsdp"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ROOT = Path(__file__).parents[2]


def start(command):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests"])),
    }
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT)
    return subprocess.Popen([*TORCHRUN, *map(str, command)], start_new_session=True, **options)


def finish(launcher):
    """Its output; nothing is left running."""
    try:
        return launcher.communicate(timeout=300)[0]
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """A folder with the runs of one process (`single`) and of two."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [
        f"--{k}={v}" for k, v in dict(
            model=base, task="relay", topology="relay", latent_steps=2, alignment="learned", checkpointing="all",
            adapters="per_role", restate_steps=2,
            max_steps=4, learning_rate=1e-2, gradient_accumulation_steps=2, per_device_eval_batch_size=4,
            eval_size=9, max_new_tokens=3, temperature=1, save_steps=2, disable_tqdm=True,
        ).items()
    ]  # fmt: skip
    single = [*flags, f"--output_dir={folder / 'single'}", "--per_device_train_batch_size=4"]
    assert train.main([*single, "--disable_final_eval=True"]) == 0
    pair = start([two_processes.__file__, folder, *flags, "--per_device_train_batch_size=2"])
    output = finish(pair)
    assert pair.returncode == 0, output
    (folder / "output").write_text(output)
    return folder


def weights(folder):
    files = ("adapter_model.safetensors", "sender/adapter_model.safetensors", "alignment.safetensors")
    return {f"{file} {k}": v for file in files for k, v in load_file(Path(folder, file)).items()}


def records(file):
    """What two evaluations share to the bit: not the time, nor what is rounded differently in other batches."""
    return [(*r.key, r.prompt, r.answer, r.correct, r.tokens) for r in read_records(file)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", two_processes.CASES)
def test_gradients_are_those_of_one_process(runs, tmp_path, case, kind):
    expected = two_processes.gradients_of_a_step(case, tmp_path)
    assert any(value.any() for value in expected.values())
    assert_same(torch.load(runs / f"{case} {kind}.pt"), expected, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_at_the_weights_of_one_process(runs, kind):
    assert_close(weights(runs / kind), weights(runs / "single"))


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_identical(runs, kind):
    expected, actual = weights(runs / kind), weights(runs / f"{kind}-resumed")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_resume_under_another_number_of_processes(runs, tmp_path, flags, kind):
    assert_close(weights(runs / f"{kind}-from-single"), weights(runs / "single"))
    description = json.loads((runs / kind / "summary.json").read_text())
    same = {k: description["system"][k] for k in ("alignment", "checkpointing", "latent_steps", "adapters")}
    changes = dict(max_steps=4, temperature=1, resume_from_checkpoint=runs / kind / "checkpoint-2")
    assert train.main(flags(**same, **changes, output_dir=tmp_path / "one", disable_final_eval=True)) == 0
    assert_close(weights(tmp_path / "one"), weights(runs / "single"))


def assert_close(actual, expected):
    # Adam divides by the gradient's own size: a float32 rounding of a small one is a large part of its update.
    assert actual.keys() == expected.keys()
    assert max(error(actual[name], expected[name], floor=1e-2) for name in expected) < 1e-3


@pytest.mark.parametrize("name", ["ddp-flags", "fsdp-flags", "fsdp-launched"])
def test_arguments_of_the_wrapped_model(runs, name):
    """Those of DDP and FSDP, and FSDP asked for by a launcher, change how and not what."""
    expected, actual = weights(runs / name.partition("-")[0]), weights(runs / name)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    summary = json.loads((runs / name / "summary.json").read_text())
    assert summary["parallel"] == ("ddp" if name.startswith("ddp") else "fsdp2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_all_processes(runs, kind):
    said = {(runs / f"{kind}-nan-{i}.txt").read_text().replace(" in process 1: step", ": step") for i in range(2)}
    (line,) = said
    assert line.startswith(
        "2 python -m diffmas.train: error: step 3: the loss of micro-batch 2 of 2 is nan in process 1;"
    )
    assert {p.name for p in Path(f"{runs / kind}-nan").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_loads_in_stock_peft(runs, base, kind):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), runs / kind)
    loaded = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    saved = load_file(runs / kind / "adapter_model.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_shared_out_and_complete(runs, tmp_path, kind):
    arguments = ["--batch_size=4", "--seed=42", "--disable_tqdm", f"--output_dir={tmp_path}"]
    assert evaluate.main([f"--run={runs / kind}", *arguments]) == 0
    assert records(runs / kind / "eval.jsonl") == records(tmp_path / "eval.jsonl")
    summary = json.loads((runs / kind / "summary.json").read_text())
    assert (summary["parallel"], summary["machine"]["processes"]) == ({"ddp": "ddp", "fsdp": "fsdp2"}[kind], 2)


def test_eval_program_runs_on_two_processes(runs, tmp_path):
    arguments = ["--batch_size=2", "--disable_tqdm", f"--output_dir={tmp_path}"]
    assert evaluate.main([f"--run={runs / 'single'}", *arguments]) == 0
    assert records(runs / "single" / "eval" / "eval.jsonl") == records(tmp_path / "eval.jsonl")


def test_output_is_that_of_one_process(runs):
    output = (runs / "output").read_text()
    assert output.count("held-out items") == len(KINDS) + 1
    assert output.count("holds a run already") == 2


def test_ctrl_c_stops_all_processes_after_the_same_step(flags, tmp_path):
    run = tmp_path / "run"
    command = flags(max_steps=1000, save_steps=1000, logging_steps=1, disable_final_eval=True, use_cpu=None)
    launcher = start(["-m", "diffmas.train", *command])
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while launcher.poll() is None and (not metrics.is_file() or not metrics.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # A terminal sends it to the launcher and to the processes, and the launcher passes it on to them.
    os.killpg(launcher.pid, signal.SIGINT)
    output = finish(launcher)
    assert launcher.returncode != 0
    assert output.count("stopped at step") == 1, output
    (checkpoint,) = run.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert checkpoint.name == f"checkpoint-{state['global_step']}" and state["global_step"] < 1000
    assert {p.name for p in checkpoint.iterdir()} >= {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"}
    assert f"--resume_from_checkpoint {run}" in output


def test_fsdp1_is_refused(flags, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert train.main(flags()) == 2
    assert "fsdp_version is 1; allowed: 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
@pytest.mark.parametrize("asked", [dict(auto_batch=True), dict(checkpointing="auto")], ids=str)
def test_no_micro_batch_is_found_for_weights_in_parts(name, asked, flags, monkeypatch):
    parsed = parse_training(flags(**asked))
    # Set by the launcher; set here once transformers has looked, since not every engine is installed.
    for variable, value in {f"ACCELERATE_USE_{name}": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "",
                            "FSDP_CPU_RAM_EFFICIENT_LOADING": ""}.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"with {name}; allowed: both without it"):
        session.train(*parsed)


def test_no_micro_batch_is_found_with_fsdp_by_flag(flags, capsys, monkeypatch):
    for variable in ("FSDP_AUTO_WRAP_POLICY", "FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_VERSION"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert train.main([*flags(auto_batch=True), "--fsdp"]) == 2
    assert "auto_batch is True" in (error := capsys.readouterr().err) and "with FSDP; allowed: both without it" in error
