"""What the programs write: nothing about other libraries' affairs, a line where it takes long, a useful card."""

import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from diffmas import ablate, chat, train
from diffmas import eval as evaluate
from diffmas.loading import build_system
from diffmas.runs.card import card
from diffmas.runs.settings import SystemArguments
from diffmas.support import progress

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text())
NOISE = ("Warning", "Loading weights", "USDT", "STAGE", "mtime", "[transformers]", "Traceback")


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def quiet(captured):
    text = captured.out + captured.err
    assert not [word for word in NOISE if word in text], text
    return captured.out


def test_no_program_says_what_nobody_can_act_on(flags, tmp_path, capfd, no_warnings, caplog):
    run, given = tmp_path / "run", flags(max_steps=2, save_steps=1, save_total_limit=1, eval_size=3)
    # Whatever another test has set.
    caplog.set_level(logging.WARNING, logger="transformers")
    for logger in ("transformers.trainer_utils", "transformers"):
        assert logging.getLogger(logger).isEnabledFor(logging.WARNING)
    assert train.main(given) == 0
    assert train.main([*flags(max_steps=3, eval_size=3), f"--resume_from_checkpoint={run}"]) == 0
    assert evaluate.main([f"--run={run}", "--disable_tqdm=true"]) == 0
    assert chat.main(["--run", str(run), "--once", "evidence=A1", "question=Recall A"]) == 0
    more = flags(max_steps=1, eval_size=3, output_dir=None)
    assert evaluate.main([*more, f"--run={tmp_path / 'm'}", "--methods=single,single+sft,text+sft"]) == 0
    swept = [f for f in more if not f.startswith("--latent_steps")]
    assert ablate.main([*swept, f"--run={tmp_path / 'a'}", "--latent_steps=0,1", "--disable_tqdm=true"]) == 0
    quiet(capfd.readouterr())


def test_the_profiler_announces_nothing(flags, tmp_path):
    """In a process of its own, since the profiler is told once."""
    given = flags(max_steps=1, auto_batch=True, checkpointing="auto", disable_final_eval=True, train_size=64)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KINETO")}
    done = subprocess.run(
        [sys.executable, "-m", "diffmas.train", *given], capture_output=True, text=True, env=environment, check=True
    )
    assert "micro-batch" in done.stdout and not [word for word in NOISE if word in done.stdout + done.stderr]


def test_what_takes_long_is_said_on_a_line(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    with progress.announced("at once"):
        pass
    with progress.announced("loading a model"):
        time.sleep(0.3)
    assert list(progress.counted([1, 2, 3], "counting")) == [1, 2, 3]
    assert capsys.readouterr().out == "loading a model …\n"
    monkeypatch.setattr(progress, "PATIENCE", 0)
    assert list(progress.counted([1, 2, 3], "counting")) == [1, 2, 3]
    assert capsys.readouterr().out == "counting: 0 of 3\n"
    monkeypatch.setattr(progress, "PATIENCE", 0.2)
    with progress.Lines(True) as lines:
        bar = lines.add_task("evaluating", total=4)
        lines.update(bar, description="evaluating: a")
        lines.advance(bar, 2)
        time.sleep(1)
    assert capsys.readouterr().out == "evaluating: a: 2 of 4\n"


def test_memory_is_measured_with_a_line_each(flags, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    given = flags(max_steps=1, auto_batch=True, checkpointing="auto", disable_final_eval=True, train_size=64)
    assert train.main(given) == 0
    out = capsys.readouterr().out
    assert all(f"measuring the memory of checkpointing {mode} …" in out for mode in ("none", "prefill", "all"))


def test_the_card_of_an_adapter(flags, base, tmp_path):
    assert train.main(flags(disable_final_eval=True)) == 0
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint-6"):
        text = (folder / "README.md").read_text()
        head = yaml.safe_load(text.split("---")[1])
        assert head["library_name"] == "peft" and "base_model" not in head
        assert "More Information Needed" not in text and str(tmp_path) not in text and base not in text
        assert f"`{Path(base).name}`, a local folder" in text and "sender → solver; topology relay" in text
        assert "| task | relay |" in text and "| latent steps | 2 |" in text and "| learning rate | 0.01 |" in text
        assert "python -m diffmas.eval --run FOLDER" in text
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)


def test_the_card_of_an_embedded_and_of_a_hub_base():
    system, _ = build_system(SystemArguments(topology="relay"))
    assert "the base `embedded` that DiffMAS brings" in card(system, {})
    assert 'from_pretrained(EMBEDDED["embedded"])' in card(system, {})
    text = card(system, {"system": {"model_name_or_path": "Qwen/Qwen3-4B"}, "task": {"prompts": "/home/me/two.yaml"}})
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "Qwen/Qwen3-4B"
    assert 'from_pretrained("Qwen/Qwen3-4B")' in text and "/home/me" not in text and "| prompts | two.yaml |" in text


@pytest.mark.parametrize("module", BENCHMARKS)
def test_every_benchmark_describes_itself(module, monkeypatch, capsys):
    imported = pytest.importorskip(f"benchmarks.{module}", exc_type=ImportError)
    monkeypatch.setattr(sys, "argv", [f"{module}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        imported.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: python -m benchmarks.{module} [-h]" in out
    assert " ".join(imported.__doc__.split())[:30] in " ".join(out.split())
