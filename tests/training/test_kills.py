"""Trainings and comparisons killed at any moment, from start to end: started again, they end as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffmas.evaluation.records import KEY, read_records

#: Moments of a test; more of them take only time.
KILLS = int(os.environ.get("DIFFMAS_TEST_KILLS", 6))
ROOT = Path(__file__).parents[2]


class Server:
    """Programs in processes that can be killed; see `fork_server.py`."""

    def __init__(self, output):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, Path(__file__).with_name("fork_server.py")]
        self.output = output
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        assert json.loads(self.process.stdout.readline()) == "ready"

    def run(self, program, argv, kill_after=None, number=signal.SIGKILL):
        """The status and the seconds it took."""
        request = dict(program=program, argv=argv, kill_after=kill_after, signal=number, output=str(self.output))
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["status"], answer["seconds"]

    def said(self):
        return self.output.read_text() if self.output.is_file() else ""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server") / "output")
    yield server
    server.process.stdin.close()
    server.process.wait()


def moments(seed, seconds):
    """Random moments, one in each of as many equal parts of a run."""
    draw = random.Random(seed)
    return [seconds * (i + draw.random()) / KILLS for i in range(KILLS)]


def answers(path):
    """What two runs share to the bit: all but the time."""
    found = [{**vars(record), "seconds": None} for record in read_records(path)]
    return {tuple(record[name] for name in KEY): record for record in found}, len(found)


def same_weights(a, b):
    first, second = (load_file(Path(folder, "adapter_model.safetensors")) for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def go_on(server, argv, run):
    """The command of somebody whose run was killed."""
    resume = [f"--resume_from_checkpoint={run}"] if (run / "system.json").is_file() else []
    status, _ = server.run("train", [*argv, f"--output_dir={run}", *resume])
    assert status == 0, server.said()[-2000:]


def check_training(run, whole):
    assert same_weights(run, whole)
    (records, count), (expected, _) = answers(run / "eval.jsonl"), answers(whole / "eval.jsonl")
    assert records == expected and count == len(expected)
    logged, wanted = (
        [(e["step"], e["loss"]) for e in map(json.loads, (f / "metrics.jsonl").read_text().splitlines()) if "loss" in e]
        for f in (run, whole)
    )
    assert logged == wanted
    accuracies = [
        {k: v for k, v in json.loads((f / "summary.json").read_text()).items() if k.startswith("accuracy")}
        for f in (run, whole)
    ]
    assert accuracies[0] == accuracies[1]
    assert not [path.name for path in run.iterdir() if path.name.startswith((".checkpoint", ".weights"))]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_killed_training_ends_as_if_it_had_not_been(server, flags, tmp_path, number):
    argv = flags(output_dir=None, logging_steps=1, save_total_limit=2, temperature=1)
    whole = tmp_path / "whole"
    status, seconds = server.run("train", [*argv, f"--output_dir={whole}"])
    assert status == 0, server.said()
    every = 1 if number == signal.SIGKILL else 3
    for i, moment in list(enumerate(moments(number, seconds)))[::every]:
        run = tmp_path / f"run-{i}"
        status, _ = server.run("train", [*argv, f"--output_dir={run}"], moment, number)
        assert status in (0, 130, -number)
        if status != 0:
            go_on(server, argv, run)
        check_training(run, whole)


def test_a_training_killed_again_and_again(server, flags, tmp_path):
    argv = flags(output_dir=None, logging_steps=1, temperature=1)
    whole, run = tmp_path / "whole", tmp_path / "run"
    _, seconds = server.run("train", [*argv, f"--output_dir={whole}"])
    draw = random.Random(1)
    for _ in range(4):
        resume = [f"--resume_from_checkpoint={run}"] if (run / "system.json").is_file() else []
        server.run("train", [*argv, f"--output_dir={run}", *resume], seconds * (0.4 + 0.4 * draw.random()))
    go_on(server, argv, run)
    check_training(run, whole)


def test_a_killed_comparison_ends_as_if_it_had_not_been(server, flags, tmp_path):
    argv = flags(
        output_dir=None, max_steps=3, temperature=1, save_steps=1, eval_size=6, per_device_eval_batch_size=None
    )
    argv = [*argv, "--methods=diffmas,single", "--seeds=0", "--controls=matched,mismatched", "--batch_size=4"]
    whole = tmp_path / "whole"
    status, seconds = server.run("eval", [*argv, f"--run={whole}"])
    assert status == 0, server.said()
    expected, _ = answers(whole / "items.jsonl")
    (trained,) = whole.glob("training/*/*/*")
    for i, moment in enumerate(moments(2, seconds)):
        run = tmp_path / f"run-{i}"
        status, _ = server.run("eval", [*argv, f"--run={run}"], moment)
        if status != 0:
            status, _ = server.run("eval", [*argv, f"--run={run}"])
        assert status == 0, server.said()[-2000:]
        records, count = answers(run / "items.jsonl")
        assert records == expected and count == len(expected)
        assert same_weights(run / trained.relative_to(whole), trained)
