"""What cannot fit into memory is refused before it is tried, by the name of what asks for it; what fits is not."""

import json
import math

import pytest
import torch

from diffmas import chat, train
from diffmas import eval as evaluate
from diffmas.agents import room
from diffmas.training import preflight
from diffmas.training.trainer import SystemTrainer


def refused(capsys, argv, program=train):
    assert program.main(argv) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.fixture
def free(monkeypatch):
    """`free(n)`: so many bytes are free, on every device."""

    def set_free(count):
        for module in (room, preflight):
            monkeypatch.setattr(module, "available_bytes", lambda device: count)

    return set_free


@pytest.mark.parametrize("steps", [10**9, 10**18])
def test_latent_steps(flags, tmp_path, capsys, steps):
    assert f"latent_steps is {steps}" in refused(capsys, flags(latent_steps=steps))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [10**9, 10**12])
def test_rank(flags, capsys, rank):
    said = refused(capsys, flags(lora_r=rank))
    assert f"lora_r is {rank}, which takes at least" in said and "allowed: up to" in said


def test_chat_with_too_many_latent_steps(base, capsys):
    argv = ["--model", base, "--topology", "sequential", "--prompts", "reasoning", "--once", "hello"]
    assert "latent_steps is 1000000000" in refused(capsys, [*argv, "--latent_steps", "1000000000"], chat)


def test_a_batch(flags, capsys, free):
    free(10**6)
    said = refused(capsys, flags(per_device_train_batch_size=10_000, disable_final_eval=True))
    assert "per_device_train_batch_size is 10000" in said


def test_a_long_item(base, tmp_path, capsys, free):
    free(20 * 10**6)
    items = [{"question": "1 " * (500_000 if i == 1 else 2), "answer": "1"} for i in range(6)]
    task = tmp_path / "items.jsonl"
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    argv = [f"--model={base}", f"--task={task}", "--topology=single", "--eval_size=2", "--disable_tqdm=True"]
    said = refused(capsys, [*argv, "--disable_final_eval", f"--output_dir={tmp_path / 'run'}", "--max_steps=1"])
    assert "item 2" in said or "per_device_train_batch_size" in said
    assert not (tmp_path / "run").exists()


def test_samples_and_rows_of_an_evaluation(flags, tmp_path, capsys, free):
    assert train.main(flags(max_steps=1, disable_final_eval=True)) == 0
    free(10_000)
    run = ["--disable_tqdm", f"--run={tmp_path / 'run'}"]
    assert "rows are decoded together (batch_size)" in refused(capsys, [*run, "--batch_size=9"], evaluate)


def test_what_fits_is_not_refused(flags, free):
    free(10**8)
    assert train.main(flags(max_steps=1, per_device_train_batch_size=16, latent_steps=20)) == 0


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]
)
def test_out_of_memory_in_a_step_is_a_line(flags, capsys, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(SystemTrainer, "compute_loss", fail)
    said = refused(capsys, flags())
    assert "a micro-batch of 4 rows does not fit into memory" in said and "--auto_batch" in said


def test_another_error_in_a_step_keeps_its_traceback(flags, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(SystemTrainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        train.main(flags())


def group(folder, limit, used, cache):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")


def test_limits_of_control_groups(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    root = tmp_path / "root"
    assert room.cgroup_bytes(root, membership) == math.inf
    group(root / "outer" / "inner", "max", 10, 0)
    assert room.cgroup_bytes(root, membership) == math.inf
    group(root / "outer", 1000, 700, 50)
    assert room.cgroup_bytes(root, membership) == 350
    group(root / "outer" / "inner", 800, 700, 0)
    assert room.cgroup_bytes(root, membership) == 100
    assert room.cgroup_bytes(root, tmp_path / "nothing") == math.inf


def test_free_memory_is_positive_and_below_what_the_machine_has():
    import psutil

    assert 0 < room.available_bytes(torch.device("cpu")) <= psutil.virtual_memory().total
