"""A run and its folder: going on from it, what it holds, who may write into it, and that it stands on its own."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffmas import chat, train
from diffmas import eval as evaluate
from diffmas.command_line import parse_training
from diffmas.evaluation.records import read_records
from diffmas.runs.metrics import read_metrics
from diffmas.support.lock import locked
from diffmas.training.checkpoints import STAGING, checkpoints, damage, rotate
from diffmas.training.trainer import StopOnInterrupt


def weights(folder):
    return load_file(Path(folder, "adapter_model.safetensors"))


def same(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def answers(folder):
    return [{**vars(record), "seconds": None} for record in read_records(Path(folder, "eval.jsonl"))]


def stop_at(step):
    """Ctrl-C during the step `step`."""
    on_step_end = StopOnInterrupt.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        self.interrupted |= state.global_step == step
        return on_step_end(self, args, state, control, **kwargs)

    return interrupted


def error_of(capsys, argv, program=train):
    assert program.main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def module_flags(base):
    values = dict(
        model=base, task="relay", topology="relay", latent_steps=2, max_steps=6, learning_rate=1e-2, eval_size=9,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, per_device_eval_batch_size=4, max_new_tokens=3,
        temperature=0, save_steps=2, save_total_limit=5, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    return [f"--{k}={v}" for k, v in values.items()]


@pytest.fixture(scope="module")
def whole(module_flags, tmp_path_factory):
    """A run of six steps with checkpoints after 2, 4 and 6, trained to its end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*module_flags, f"--output_dir={run}"]) == 0
    return run


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, in another place, as it was when its last evaluation was cut off."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for name in ("adapter_model.safetensors", "summary.json", "eval.jsonl", "report.html"):
        (copy / name).unlink()
    return copy


class TestGoingOn:
    def test_at_the_last_step_nothing_is_trained(self, run, whole):
        before = (run / "metrics.jsonl").read_text()
        assert train.main([f"--resume_from_checkpoint={run}"]) == 0
        assert [p.name for p in checkpoints(run)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
        assert same(run, whole) and answers(run) == answers(whole)
        assert json.loads((run / "summary.json").read_text())["steps"] == 6
        assert (run / "metrics.jsonl").read_text() == before

    def test_past_the_last_step_nothing_is_trained(self, run):
        assert train.main([f"--resume_from_checkpoint={run}", "--max_steps=3", "--disable_final_eval"]) == 0
        assert same(run, run / "checkpoint-6") and not (run / "checkpoint-7").exists()

    def test_an_epoch_s_last_step_is_the_last(self, module_flags, tmp_path):
        command = [*module_flags, "--max_steps=-1", "--num_train_epochs=2", "--train_size=20", "--disable_final_eval"]
        run = tmp_path / "run"
        assert train.main([*command, f"--output_dir={run}", "--save_strategy=epoch"]) == 0
        last = checkpoints(run)[0].name
        first = weights(run)
        assert train.main([f"--resume_from_checkpoint={run}"]) == 0
        assert checkpoints(run)[0].name == last
        assert all(torch.equal(first[name], value) for name, value in weights(run).items())

    def test_more_steps_are_trained_when_they_are_asked_for(self, run, capsys):
        assert train.main([f"--resume_from_checkpoint={run}", "--max_steps=7", "--disable_final_eval"]) == 0
        assert "max_steps is 7; the run had 6" in capsys.readouterr().out
        assert checkpoints(run)[0].name == "checkpoint-7"

    def test_the_best_checkpoint_is_the_result_after_a_move_too(self, module_flags, tmp_path):
        best = ["--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=2", "--disable_final_eval"]
        first, moved = tmp_path / "first", tmp_path / "moved"
        assert train.main([*module_flags, *best, f"--output_dir={first}"]) == 0
        result = weights(first)
        first.rename(moved)
        (moved / "adapter_model.safetensors").unlink()
        assert train.main([f"--resume_from_checkpoint={moved}"]) == 0
        assert all(torch.equal(result[name], value) for name, value in weights(moved).items())


class TestOwnSettings:
    @pytest.mark.parametrize("how", ["folder", "checkpoint", "True"])
    def test_they_are_the_default(self, run, whole, capsys, how):
        shutil.rmtree(run / "checkpoint-6")
        shutil.rmtree(run / "checkpoint-4")
        name = {"folder": run, "checkpoint": run / "checkpoint-2", "True": True}[how]
        more = [f"--output_dir={run}"] if how == "True" else []
        assert train.main([f"--resume_from_checkpoint={name}", *more]) == 0
        assert f"going on from {run / 'checkpoint-2'}, step 2" in capsys.readouterr().out
        assert same(run, whole) and answers(run) == answers(whole)
        keys = ("system", "topology", "task", "decoding", "training", "data")
        summaries = [json.loads((f / "summary.json").read_text()) for f in (run, whole)]
        assert [summaries[0][k] for k in keys] == [summaries[1][k] for k in keys]

    def test_what_differs_is_named(self, run, capsys):
        shutil.rmtree(run / "checkpoint-6")
        given = ["--learning_rate=2e-2", "--per_device_train_batch_size=2", "--weight_decay=0.1", "--temperature=0.5"]
        assert train.main([f"--resume_from_checkpoint={run}", "--disable_final_eval", *given]) == 0
        said = capsys.readouterr().out
        for line in (
            "learning_rate is 0.02; the run had 0.01", "per_device_train_batch_size is 2; the run had 4",
            "weight_decay is 0.1; the run had the default", "temperature is 0.5; the run had 0.0",
            "disable_final_eval is True; the run had the default",
        ):  # fmt: skip
            assert line in said

    @pytest.mark.parametrize(
        "given",
        ["learning_rate=2e-2", "weight_decay=5", "adam_beta1=0.1", "adam_epsilon=1", "lr_scheduler_type=constant"],
    )
    def test_what_is_given_takes_effect(self, run, whole, given):
        shutil.rmtree(run / "checkpoint-6")
        assert train.main([f"--resume_from_checkpoint={run}", "--disable_final_eval", f"--{given}"]) == 0
        assert not same(run, whole)
        rates = {e["step"]: e["learning_rate"] for e in read_metrics(run / "metrics.jsonl") if "learning_rate" in e}
        # A cosine over six steps, after four of them.
        expected = {"learning_rate=2e-2": 2e-2 / 4, "lr_scheduler_type=constant": 1e-2}.get(given, 1e-2 / 4)
        assert rates[5] == pytest.approx(expected)

    def test_how_often_it_saves_and_logs_takes_effect(self, run):
        given = [f"--resume_from_checkpoint={run / 'checkpoint-2'}", "--save_steps=1", "--logging_steps=2"]
        assert train.main([*given, "--disable_final_eval"]) == 0
        assert [p.name for p in checkpoints(run)] == [f"checkpoint-{i}" for i in (6, 5, 4, 3, 2)]
        assert [e["step"] for e in read_metrics(run / "metrics.jsonl") if "loss" in e] == [1, 2, 4, 6]

    @pytest.mark.parametrize("given", ["optim=sgd", "lr_scheduler_type=reduce_lr_on_plateau"])
    def test_what_the_state_does_not_fit_is_refused(self, run, capsys, given):
        more = ["--eval_strategy=steps", "--eval_steps=2"] if "plateau" in given else []
        said = error_of(capsys, [f"--resume_from_checkpoint={run}", f"--{given}", *more])
        assert f"{given.split('=')[0]} is {given.split('=')[1]!r}, but the run to go on with had " in said

    def test_a_config_file_wins_over_them(self, run, tmp_path, capsys):
        config = tmp_path / "more.yaml"
        config.write_text("max_steps: 7\ndisable_final_eval: true\n")
        assert train.main([f"--resume_from_checkpoint={run}", f"--config={config}"]) == 0
        assert "max_steps is 7; the run had 6" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("--latent_steps=3", "latent_steps is 3, but the run to go on with had 2"),
            ("--lora_r=4", "lora_r is 4, but the run to go on with had 8"),
            ("--task_seed=1", "task_seed is 1, but the run to go on with had 0"),
            ("--alignment=ridge", "alignment is 'ridge', but the run to go on with had 'identity'"),
            ("--task=relay:slots=4", "task is 'relay:slots=4', but the run to go on with had 'relay'"),
        ],
    )
    def test_what_makes_another_run_is_refused(self, run, capsys, flag, message):
        before = (run / "system.json").read_bytes()
        assert message in error_of(capsys, [f"--resume_from_checkpoint={run}", flag])
        assert (run / "system.json").read_bytes() == before

    def test_a_link_to_a_checkpoint_is_that_checkpoint(self, run, whole, tmp_path, monkeypatch):
        shutil.rmtree(run / "checkpoint-6")
        shutil.rmtree(run / "checkpoint-4")
        (tmp_path / "link").symlink_to(run / "checkpoint-2")
        assert train.main([f"--resume_from_checkpoint={tmp_path / 'link'}", "--disable_final_eval"]) == 0
        assert same(run, whole)
        (run / "adapter_model.safetensors").unlink()
        monkeypatch.chdir(run / "checkpoint-2")
        assert train.main(["--resume_from_checkpoint=.", "--disable_final_eval"]) == 0
        assert same(run, whole)

    def test_later_checkpoints_are_set_aside(self, run, capsys):
        given = [f"--resume_from_checkpoint={run / 'checkpoint-2'}", "--learning_rate=2e-2", "--disable_final_eval"]
        assert train.main([*given, "--max_steps=3", "--save_total_limit=1"]) == 0
        assert f"{run / 'checkpoint-6'} is kept as checkpoint-6.old" in capsys.readouterr().out
        assert [p.name for p in checkpoints(run)] == ["checkpoint-3"], "going on again goes on from these weights"
        assert damage(run / "checkpoint-4.old") is None and damage(run / "checkpoint-6.old") is None

    def test_epochs_win_over_steps_nobody_asked_for_now(self, run, capsys):
        given = [f"--resume_from_checkpoint={run}", "--num_train_epochs=2", "--train_size=24", "--disable_final_eval"]
        assert "train_size is 24, but the run" in error_of(capsys, given)
        args = parse_training([given[0], given[1]])[3]
        assert (args.max_steps, args.num_train_epochs) == (-1, 2)
        assert parse_training([given[0]])[3].max_steps == 6
        assert parse_training(["--num_train_epochs=2"])[3].max_steps == -1

    def test_where_nothing_is_trained_settings_stay(self, run, whole, capsys):
        given = [f"--resume_from_checkpoint={run}", "--learning_rate=1", "--seed=7", "--disable_final_eval"]
        assert train.main(given) == 0
        assert "no step is left to train: the run's training settings stay" in capsys.readouterr().out
        kept, before = (json.loads((folder / "system.json").read_text()) for folder in (run, whole))
        assert kept["training"] == before["training"] and kept["arguments"] == before["arguments"]
        assert json.loads((run / "summary.json").read_text())["training"] == before["training"]

    def test_a_finished_run_that_goes_on_is_unfinished(self, whole, tmp_path, monkeypatch, capsys):
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        monkeypatch.setattr(StopOnInterrupt, "on_step_end", stop_at(7))
        assert train.main([f"--resume_from_checkpoint={run}", "--max_steps=9", "--disable_final_eval"]) == 130
        assert "adapter_model.safetensors is kept as adapter_model.old.safetensors" in capsys.readouterr().out
        assert "has no adapter_model.safetensors" in error_of(capsys, [f"--run={run}"], evaluate)

    @pytest.mark.parametrize("hurt", [None, shutil.rmtree])
    def test_the_best_so_far_comes_along(self, module_flags, tmp_path, capsys, hurt):
        best = ["--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=2", "--disable_final_eval"]
        first = tmp_path / "first"
        assert train.main([*module_flags, *best, f"--output_dir={first}"]) == 0
        state = json.loads((first / "checkpoint-6" / "trainer_state.json").read_text())
        assert state["best_global_step"] == 2, "equal accuracies: the first is the best"
        if hurt:
            hurt(first / "checkpoint-2")
        given = [f"--resume_from_checkpoint={first / 'checkpoint-4'}", f"--output_dir={tmp_path / 'second'}"]
        if hurt:
            assert f"the best checkpoint so far is {first / 'checkpoint-2'}" in error_of(capsys, given)
        else:
            assert train.main(given) == 0 and same(tmp_path / "second", first)

    def test_what_was_evaluated_at_the_start_is_not_again(self, module_flags, tmp_path, monkeypatch):
        run = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(StopOnInterrupt, "on_step_end", stop_at(3))
            flags = [*module_flags, "--eval_on_start=True", "--disable_final_eval", f"--output_dir={run}"]
            assert train.main(flags) == 130
        assert train.main([f"--resume_from_checkpoint={run}"]) == 0
        assert [e["step"] for e in read_metrics(run / "metrics.jsonl") if "eval_accuracy" in e] == [0]

    def test_weights_alone_promise_nothing(self, module_flags, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(StopOnInterrupt, "on_step_end", stop_at(3))
        flags = [*module_flags, "--save_only_model=True", "--disable_final_eval", f"--output_dir={tmp_path / 'run'}"]
        assert train.main(flags) == 130
        assert "nothing can go on from it" in capsys.readouterr().out

    def test_a_run_that_kept_no_arguments_says_so(self, run, capsys):
        description = json.loads((run / "system.json").read_text())
        del description["arguments"]
        (run / "system.json").write_text(json.dumps(description))
        assert train.main([f"--resume_from_checkpoint={run}", "--max_steps=6", "--disable_final_eval"]) == 0
        assert "the run did not keep its training arguments" in capsys.readouterr().out

    def test_a_checkpoint_without_its_run_is_refused(self, run, tmp_path, capsys):
        shutil.copytree(run / "checkpoint-2", tmp_path / "alone" / "checkpoint-2")
        said = error_of(capsys, [f"--resume_from_checkpoint={tmp_path / 'alone' / 'checkpoint-2'}"])
        assert f"{tmp_path / 'alone'} has no system.json" in said

    def test_true_needs_a_folder(self, module_flags, capsys):
        said = error_of(capsys, [*module_flags, "--resume_from_checkpoint=True"])
        assert "resume_from_checkpoint is True without output_dir" in said

    def test_false_means_no(self, module_flags, tmp_path, capsys):
        flags = [*module_flags, "--max_steps=1", "--disable_final_eval", f"--output_dir={tmp_path / 'new'}"]
        assert train.main([*flags, "--resume_from_checkpoint=False"]) == 0

    def test_a_folder_without_a_run_is_refused(self, module_flags, tmp_path, capsys):
        said = error_of(capsys, [*module_flags, f"--resume_from_checkpoint={tmp_path}"])
        assert "it holds no checkpoint, nor a run" in said


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "how",
    [
        ["--eval_strategy=steps", "--eval_steps=1", "--lr_scheduler_type=reduce_lr_on_plateau", "--warmup_steps=0"],
        ["--eval_strategy=steps", "--eval_steps=2", "--load_best_model_at_end"],
        ["--eval_strategy=steps", "--eval_steps=1", "--save_strategy=best"],
        ["--eval_strategy=epoch", "--save_strategy=epoch", "--lr_scheduler_type=reduce_lr_on_plateau"],
    ],
    ids=["plateau", "best at the end", "best saved", "plateau by epoch"],
)
def test_ctrl_c_at_any_step_changes_nothing(module_flags, tmp_path, monkeypatch, how, step):
    """Neither a schedule nor a choice that follows what is evaluated on the way."""
    flags = [*module_flags, "--train_size=16", "--eval_size=4", "--disable_final_eval", "--max_steps=5", *how]
    if "plateau" in how[2]:
        flags.append('--lr_scheduler_kwargs={"patience": 0, "factor": 0.1}')
    assert train.main([*flags, f"--output_dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(StopOnInterrupt, "on_step_end", stop_at(step))
        assert train.main([*flags, f"--output_dir={tmp_path / 'cut'}"]) == 130
    assert checkpoints(tmp_path / "cut")[0].name == f"checkpoint-{step}"
    assert train.main([f"--resume_from_checkpoint={tmp_path / 'cut'}"]) == 0
    assert same(tmp_path / "cut", tmp_path / "whole")
    measured = [
        [
            [e.get(k) for k in ("step", "eval_accuracy", "learning_rate", "loss")]
            for e in entries
            if "train_loss" not in e
        ]
        for entries in (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole"))
    ]
    assert measured[0] == measured[1]


class TestDamage:
    def test_a_torn_line_of_metrics_is_dropped(self, run, whole, capsys):
        path = run / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        assert train.main([f"--resume_from_checkpoint={run / 'checkpoint-4'}", "--disable_final_eval"]) == 0
        path.write_bytes(b"\xff\n" + path.read_bytes())
        assert f"{path} line 1 is no entry of metrics" in error_of(capsys, [f"--resume_from_checkpoint={run}"])

    @pytest.mark.parametrize("state", [{"global_step": 6}, {"global_step": "6", "max_steps": 6, "train_batch_size": 4}])
    def test_a_state_that_says_too_little_is_damaged(self, run, state):
        (run / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state))
        assert damage(run / "checkpoint-6") == "trainer_state.json is damaged"

    def test_a_missing_learned_alignment_is_named(self, module_flags, tmp_path, capsys):
        flags = [*module_flags, "--alignment=learned", "--disable_final_eval", f"--output_dir={tmp_path / 'run'}"]
        assert train.main(flags) == 0
        (tmp_path / "run" / "checkpoint-6" / "alignment.safetensors").unlink()
        assert train.main([f"--resume_from_checkpoint={tmp_path / 'run'}"]) == 0
        said = capsys.readouterr().out
        assert "checkpoint-6 cannot be gone on from: alignment.safetensors is missing" in said

    def test_a_description_with_a_mark_is_read(self, run):
        path = run / "system.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert train.main([f"--resume_from_checkpoint={run}", "--disable_final_eval"]) == 0

    @pytest.mark.parametrize("part", ["prompts", "arguments", "training", "data"])
    def test_a_description_that_is_none(self, run, capsys, part):
        description = json.loads((run / "system.json").read_text())
        (run / "system.json").write_text(json.dumps(description | {part: 5}))
        said = error_of(capsys, [f"--resume_from_checkpoint={run}"])
        assert f"system.json has no mapping as its {part}" in said

    @pytest.mark.parametrize("hurt", [cut, Path.unlink], ids=["cut", "gone"])
    @pytest.mark.parametrize(
        "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"]
    )
    def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(self, run, whole, capsys, name, hurt):
        hurt(run / "checkpoint-6" / name)
        assert train.main([f"--resume_from_checkpoint={run}", "--disable_final_eval"]) == 0
        said = capsys.readouterr().out
        assert f"{run / 'checkpoint-6'} cannot be gone on from: {name} is " in said
        assert f"going on from {run / 'checkpoint-4'}, step 4" in said
        assert same(run, whole) and damage(run / "checkpoint-6") is None

    @pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
    def test_a_changed_byte_is_found(self, run, name):
        flip(run / "checkpoint-6" / name)
        assert damage(run / "checkpoint-6") == f"{name} is damaged"

    def test_a_damaged_checkpoint_asked_for_by_name_is_refused(self, run, capsys):
        cut(run / "checkpoint-6" / "optimizer.pt")
        said = error_of(capsys, [f"--resume_from_checkpoint={run / 'checkpoint-6'}"])
        assert "checkpoint-6': optimizer.pt is damaged; allowed: a complete checkpoint" in said

    @pytest.mark.parametrize("how", ["resume", "again"])
    def test_a_folder_whose_first_checkpoint_was_being_written(self, module_flags, whole, tmp_path, capsys, how):
        run = tmp_path / "run"
        shutil.copytree(whole / "checkpoint-2", run / STAGING / "checkpoint-2")
        cut(run / STAGING / "checkpoint-2" / "optimizer.pt")
        shutil.copy(whole / "system.json", run)
        shutil.copy(whole / "prompts.yaml", run)
        if how == "resume":
            assert train.main([f"--resume_from_checkpoint={run}"]) == 0
            assert f"{run} has no checkpoint yet: from the beginning" in capsys.readouterr().out
        else:
            assert train.main([*module_flags, f"--output_dir={run}"]) == 0
        assert same(run, whole) and not (run / STAGING).exists()

    def test_the_best_and_the_latest_checkpoints_stay(self, tmp_path):
        def left(limit, best):
            for step in (2, 4, 6, 10):
                (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
            rotate(tmp_path, limit, best)
            return sorted(int(p.name[11:]) for p in checkpoints(tmp_path))

        assert left(None, None) == left(0, 2) == [2, 4, 6, 10]
        assert left(2, None) == [6, 10] and left(1, None) == [10]
        assert left(2, 4) == [4, 10] and left(1, 4) == [4, 10] and left(1, 10) == [10] and left(3, 2) == [2, 6, 10]

    def test_only_folders_named_after_a_step_are_checkpoints(self, tmp_path):
        for name in ("checkpoint-2", "checkpoint-keep-3", "checkpoint-"):
            (tmp_path / name).mkdir()
        (tmp_path / "checkpoint-9").touch()
        assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]

    def test_another_run_is_not_written_over(self, run, whole, tmp_path, capsys):
        before = (run / "system.json").read_bytes()
        said = error_of(capsys, [f"--resume_from_checkpoint={whole}", f"--output_dir={run}"])
        assert f"output_dir is {str(run)!r}, which holds a run already" in said
        assert (run / "system.json").read_bytes() == before

    def test_an_empty_name_is_no_model(self, module_flags, capsys):
        assert "model_name_or_path is ''; allowed:" in error_of(capsys, [*module_flags, "--model="])


class TestOneWriter:
    def test_a_second_training_is_refused(self, run, capsys):
        with locked(run):
            said = error_of(capsys, [f"--resume_from_checkpoint={run}"])
        assert f"{run} is being written by another process; allowed: one at a time" in said
        assert train.main([f"--resume_from_checkpoint={run}", "--disable_final_eval"]) == 0

    def test_a_second_fresh_training_is_refused(self, module_flags, tmp_path, capsys):
        run = tmp_path / "run"
        with locked(run):
            assert "being written by another process" in error_of(capsys, [*module_flags, f"--output_dir={run}"])

    def test_a_second_evaluation_is_refused(self, whole, tmp_path, capsys):
        with locked(tmp_path / "out"):
            argv = [f"--run={whole}", f"--output_dir={tmp_path / 'out'}", "--variants=matched", "--disable_tqdm"]
            assert "being written by another process" in error_of(capsys, argv, evaluate)

    def test_a_training_where_methods_are_compared_is_refused(self, module_flags, tmp_path, capsys):
        run = tmp_path / "table"
        with locked(run):
            argv = [*module_flags[:-1], f"--run={run}", "--methods=single", "--disable_tqdm"]
            argv = [word for word in argv if not word.startswith("--per_device_eval")]
            assert "being written by another process" in error_of(capsys, argv, evaluate)


@pytest.fixture
def own_files(base, tmp_path, monkeypatch):
    """A run on files that are named by their places in a working folder: model, items, prompts and agents."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(base, home / "model")
    facts = [{"note": f"box {i} holds {i * 7 % 10}", "ask": f"box {i}?", "reply": str(i * 7 % 10)} for i in range(40)]
    (home / "items.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    (home / "prompts.yaml").write_text(
        "roles:\n  reader: {user: 'Note: {note}.'}\n  writer: {user: '{question}'}\n"
        "  single: {user: '{note} {question}'}\n"
    )
    (home / "team.yaml").write_text(
        "name: team\nhandover: latent\nagents:\n  - {name: reader}\n  - {name: writer, receives: [reader]}\n"
    )
    monkeypatch.chdir(home)
    flags = [
        "--model=model", "--task=items.jsonl", "--fields=ask,reply", "--prompts=prompts.yaml", "--topology=team.yaml",
        "--latent_steps=1", "--max_steps=2", "--save_steps=1", "--per_device_train_batch_size=4", "--eval_size=4",
        "--gradient_accumulation_steps=1", "--max_new_tokens=2", "--temperature=0", "--disable_tqdm=True",
        "--per_device_eval_batch_size=4", "--output_dir=run",
    ]  # fmt: skip
    assert train.main(flags) == 0
    return home


class TestOnItsOwn:
    def test_it_works_from_anywhere_and_after_a_move(self, own_files, tmp_path, monkeypatch, capsys):
        moved = tmp_path / "elsewhere" / "run"
        moved.parent.mkdir()
        shutil.move(own_files / "run", moved)
        for name in ("prompts.yaml", "team.yaml"):
            (own_files / name).unlink()
        monkeypatch.chdir(tmp_path)
        assert evaluate.main([f"--run={moved}", "--disable_tqdm"]) == 0
        assert [r["answer"] for r in answers(moved)] == [r["answer"] for r in answers(moved / "eval")]
        assert chat.main([f"--run={moved}", "--no_inspection", "--once", "note=box 1 holds 7", "question=box 1?"]) == 0
        (moved / "summary.json").unlink()
        assert train.main([f"--resume_from_checkpoint={moved}", "--disable_final_eval"]) == 0
        argv = [f"--run={moved}", "--methods=diffmas,single", "--controls=matched", "--batch_size=4", "--disable_tqdm"]
        assert evaluate.main(argv) == 0
        assert not list((moved / "methods").glob("training")), "the run's own adapter is the method it is"

    def test_items_that_are_gone_can_be_given_anew(self, own_files, tmp_path, capsys):
        (own_files / "items.jsonl").rename(tmp_path / "facts.jsonl")
        assert "no such file" in error_of(capsys, ["--run=run", "--disable_tqdm"], evaluate)
        assert evaluate.main(["--run=run", f"--task={tmp_path / 'facts.jsonl'}", "--disable_tqdm"]) == 0
        assert "held-out items are not those" not in capsys.readouterr().out
        again = ["--resume_from_checkpoint=run", f"--task={tmp_path / 'facts.jsonl'}", "--disable_final_eval"]
        assert train.main(again) == 0

    def test_items_that_have_changed_are_named(self, own_files, capsys):
        items = (own_files / "items.jsonl").read_text()
        (own_files / "items.jsonl").write_text(items.replace("box 39 holds", "box 39 has"))
        assert evaluate.main(["--run=run", "--variants=matched", "--disable_tqdm"]) == 0
        assert "the held-out items are not those of run's own evaluation" in capsys.readouterr().out
        said = error_of(capsys, ["--resume_from_checkpoint=run"])
        assert "the items (eval) are not those that the run to go on with was trained on" in said
        (own_files / "items.jsonl").write_text(items.replace("box 3 holds", "box 3 has"))
        assert "the items (train) are not those" in error_of(capsys, ["--resume_from_checkpoint=run"])

    def test_a_linked_file_keeps_its_name(self, own_files, monkeypatch, tmp_path):
        (own_files / "items.jsonl").rename(own_files / "blob")
        (own_files / "items.jsonl").symlink_to("blob")
        flags = ["--task=items.jsonl", "--prompts=prompts.yaml", "--fields=ask,reply", "--max_steps=1"]
        system = json.loads((own_files / "run" / "system.json").read_text())["system"]
        flags += [f"--topology={own_files / 'run' / 'topology.yaml'}", f"--model={system['model_name_or_path']}"]
        assert train.main([*flags, "--output_dir=linked", "--disable_final_eval"]) == 0
        kept = json.loads((own_files / "linked" / "system.json").read_text())
        assert kept["task"]["task"].endswith("/items.jsonl")
        monkeypatch.chdir(tmp_path)
        argv = [f"--run={own_files / 'linked'}", "--disable_tqdm", "--variants=matched", "--max_new_tokens=2"]
        assert evaluate.main(argv) == 0

    def test_a_model_folder_that_has_moved_can_be_given_anew(self, own_files, base, capsys):
        shutil.copytree(base, own_files / "base")
        description = json.loads((own_files / "run" / "system.json").read_text())
        description["system"]["model_name_or_path"] = str(own_files / "gone")
        (own_files / "run" / "system.json").write_text(json.dumps(description))
        assert "no such folder" in error_of(capsys, ["--run=run", "--disable_tqdm"], evaluate)
        given = f"--model={own_files / 'base'}"
        assert evaluate.main(["--run=run", given, "--disable_tqdm", "--variants=matched"]) == 0
        assert (
            chat.main(["--run=run", given, "--no_inspection", "--once", "note=box 1 holds 7", "question=box 1?"]) == 0
        )
        assert train.main(["--resume_from_checkpoint=run", given, "--disable_final_eval"]) == 0
        assert f"the run had {str(own_files / 'gone')!r}" in capsys.readouterr().out

    def test_the_checker_that_was_chosen_is_the_run_s(self, own_files, tmp_path, capsys):
        kept = json.loads((own_files / "run" / "system.json").read_text())["task"]["checker"]
        assert kept == "mathematics"
        (tmp_path / "words.jsonl").write_text('{"note": "n", "ask": "q?", "reply": "1"}\n' * 3)
        argv = ["--run=run", f"--eval_file={tmp_path / 'words.jsonl'}", "--disable_tqdm", "--variants=matched"]
        capsys.readouterr()
        assert evaluate.main(argv) == 0
        assert "checker: " not in capsys.readouterr().out

    def test_prompts_given_anew_have_to_be_the_same(self, own_files, tmp_path, capsys):
        other = tmp_path / "other.yaml"
        other.write_text((own_files / "prompts.yaml").read_text().replace("Note:", "Memo:"))
        said = error_of(capsys, ["--resume_from_checkpoint=run", f"--prompts={other}"])
        assert "the prompts (reader) are not those" in said

    @pytest.mark.parametrize("model", ["./nothere", "nothere/a/b", "/nowhere/model", "runs/mine", "nobody/has-this"])
    def test_a_model_that_is_not_there_is_an_error_at_once(self, module_flags, tmp_path, monkeypatch, capsys, model):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs").mkdir()
        began = time.monotonic()
        said = error_of(capsys, [*module_flags, f"--model={model}"])
        assert f"model_name_or_path is {model!r}: no such folder" in said and time.monotonic() - began < 10
        assert not list((tmp_path / "runs").iterdir())
