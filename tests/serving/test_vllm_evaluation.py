"""Evaluations whose answers vLLM decodes: the records of our own engine, also after a kill, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: .ci/vllm makes one")

from diffmas import eval as evaluate
from diffmas.evaluation.records import read_records

ENGINE = ["--engine=vllm", '--engine_args={"enforce_eager": true, "max_model_len": 1024, "max_num_seqs": 8}']
SIZE = 96


def records(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    keys = [(r["variant"], r["method"], r["control"], r["seed"], r["index"], r["sample"]) for r in found]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, found, strict=True))


def same(own, other):
    assert own.keys() == other.keys()
    for key, record in own.items():
        assert {k: record[k] for k in ("answer", "correct", "finish", "tokens", "prompt")} == {
            k: other[key][k] for k in ("answer", "correct", "finish", "tokens", "prompt")
        }


def test_a_kill_is_survived(relay_run, tmp_path):
    # A few rows at a time: there is much left to do when the first of them are done.
    flags = [f"--run={relay_run}", f"--eval_size={SIZE}", "--variants=single,matched,training_free"]
    flags += ["--disable_tqdm=true"]
    assert evaluate.main([*flags, f"--output_dir={tmp_path / 'own'}"]) == 0
    folder = tmp_path / "vllm"
    command = [sys.executable, "-m", "diffmas.eval", *flags, f"--output_dir={folder}", *ENGINE]
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        deadline = time.monotonic() + 900
        while not (found := kept(folder)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert found and list(folder.glob("diffmas-*"))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    found = kept(folder)
    assert 0 < len(found) < 3 * SIZE
    while list(folder.glob("diffmas-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(folder.glob("diffmas-*"))
    subprocess.run(command, check=True, timeout=900)
    same(records(tmp_path / "own" / "eval.jsonl"), records(folder / "eval.jsonl"))
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("own", "vllm")]
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"] and summaries[1]["engine"] == "vllm"
    # What was there before the kill is there as it was.
    after = {(r["method"], r["control"], r["index"]): r["seconds"] for r in records(folder / "eval.jsonl").values()}
    assert all(after[r.method, r.control, r.index] == r.seconds for r in found)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "eval.jsonl", "report.html", "summary.json"]


def kept(folder):
    return [record for path in folder.glob(".unfinished-*.jsonl") for record in read_records(path)]


def test_methods(relay_run, tmp_path):
    """Trained and untrained ones, with controls, on one base model; the other engine's folder is not gone on with."""
    shutil.copytree(relay_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint*", "eval", "methods"))
    flags = [
        f"--run={tmp_path / 'run'}", "--methods=single,latent,diffmas", "--eval_size=5", "--batch_size=4",
        "--samples=2", "--controls=matched,mismatched", "--disable_tqdm=true",
    ]  # fmt: skip
    own, other = tmp_path / "own", tmp_path / "vllm"
    assert evaluate.main([*flags, f"--output_dir={own}"]) == 0
    assert evaluate.main([*flags, f"--output_dir={other}", *ENGINE]) == 0
    found = [{r.key: (r.answer, r.tokens, r.finish) for r in read_records(f / "items.jsonl")} for f in (own, other)]
    assert found[0] == found[1] and len(found[0]) == 5 * 5 * 2
    assert evaluate.main([*flags, f"--output_dir={own}", *ENGINE]) == 2
    assert not list(other.glob("diffmas-*"))
