"""Trainings that go on from elsewhere, are killed at once or have nothing left to train: whose weights and settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffmas import train
from diffmas.evaluation.evaluator import Evaluator
from diffmas.training.checkpoints import checkpoints
from diffmas.training.trainer import StopOnInterrupt

BEST = ("--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=1", "--logging_steps=1")


class Killed(BaseException):
    """Nothing catches it, and so nothing is put in order, as after SIGKILL."""


def same(a, b):
    first, second = (load_file(Path(folder, "adapter_model.safetensors")) for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def described(folder, file="system.json"):
    found = json.loads((folder / file).read_text())
    return found["training"], found["arguments"]


@pytest.fixture
def killed(monkeypatch):
    """`killed(step, argv)`: a training killed behind that step, before a checkpoint of it."""

    def run(step, argv):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(StopOnInterrupt, "on_step_end", on_step_end)
            with pytest.raises(Killed):
                train.main([str(word) for word in argv])

    return run


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of six steps with checkpoints after 2, 4 and 6, trained to its end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    values = dict(
        model=base, task="relay", topology="relay", latent_steps=2, max_steps=6, learning_rate=1e-2, eval_size=6,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, per_device_eval_batch_size=6, max_new_tokens=3,
        temperature=0, save_steps=2, save_total_limit=5, disable_tqdm=True, disable_final_eval=True, use_cpu=True,
        output_dir=run,
    )  # fmt: skip
    assert train.main([f"--{k}={v}" for k, v in values.items()]) == 0
    return run


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


class TestSettingsAreThoseOfTheWeights:
    @pytest.mark.parametrize("where", ["folder", "checkpoint"])
    def test_of_a_run_that_is_finished_elsewhere(self, whole, tmp_path, capsys, where):
        there, other = whole if where == "folder" else whole / "checkpoint-6", tmp_path / "other"
        argv = [f"--resume_from_checkpoint={there}", f"--output_dir={other}", "--learning_rate=0.5", "--seed=3"]
        assert train.main(argv) == 0
        assert "no step is left to train" in capsys.readouterr().out
        assert same(whole, other)
        assert described(other) == described(other, "summary.json") == described(whole)

    @pytest.mark.parametrize("back", ["max_steps=6", "num_train_epochs=0.0001"])
    def test_after_one_that_trained_nothing_of_them(self, run, whole, killed, back):
        killed(7, [f"--resume_from_checkpoint={run}", "--max_steps=10", "--learning_rate=0.02"])
        assert described(run)[0]["learning_rate"] == 0.02
        assert train.main([f"--resume_from_checkpoint={run}", f"--{back}"]) == 0
        assert same(run, whole)
        assert described(run) == described(run, "summary.json") == described(whole)

    def test_after_one_that_trained_some_of_them(self, run, killed):
        killed(9, [f"--resume_from_checkpoint={run}", "--max_steps=10", "--learning_rate=0.02"])
        assert train.main([f"--resume_from_checkpoint={run}", "--max_steps=8", "--learning_rate=0.5"]) == 0
        assert same(run, run / "checkpoint-8")
        training, arguments = described(run)
        assert training["learning_rate"] == 0.02 and arguments["max_steps"] == 10

    def test_of_a_checkpoint_that_has_kept_none(self, run, whole):
        for checkpoint in checkpoints(run):
            (checkpoint / "settings.json").unlink()
        assert train.main([f"--resume_from_checkpoint={run}", "--learning_rate=0.5"]) == 0
        assert described(run) == described(whole)


class TestElsewhere:
    @pytest.mark.parametrize("again", ["folder", "True", "third place"])
    def test_a_run_killed_before_its_first_checkpoint_begins_there_again(self, whole, tmp_path, killed, again, capsys):
        start = [f"--resume_from_checkpoint={whole / 'checkpoint-4'}", "--learning_rate=0.02", "--save_steps=100"]
        uninterrupted, other = tmp_path / "uninterrupted", tmp_path / "other"
        assert train.main([*start, f"--output_dir={uninterrupted}"]) == 0
        killed(5, [*start, f"--output_dir={other}"])
        result = tmp_path / "third" if again == "third place" else other
        resume = True if again == "True" else other
        capsys.readouterr()
        assert train.main([f"--resume_from_checkpoint={resume}", f"--output_dir={result}"]) == 0
        assert f"going on from {whole / 'checkpoint-4'}, step 4" in capsys.readouterr().out
        assert same(result, uninterrupted)
        assert described(result) == described(uninterrupted)

    def test_so_does_one_that_has_brought_the_best_along(self, whole, tmp_path, killed):
        first, other, uninterrupted = (tmp_path / name for name in ("first", "other", "uninterrupted"))
        argv = [f"--resume_from_checkpoint={whole / 'checkpoint-2'}", *BEST, "--save_steps=1"]
        assert train.main([*argv, f"--output_dir={first}"]) == 0
        start = [f"--resume_from_checkpoint={first / 'checkpoint-5'}", "--learning_rate=0.05", "--save_steps=100",
                 "--eval_steps=100", "--max_steps=8"]  # fmt: skip
        assert train.main([*start, f"--output_dir={uninterrupted}", "--load_best_model_at_end=False"]) == 0
        killed(6, [*start, f"--output_dir={other}"])
        best = [path.name for path in checkpoints(other)]
        assert len(best) == 1 and best != ["checkpoint-5"], "an earlier one is the best so far"
        assert train.main([f"--resume_from_checkpoint={other}", "--load_best_model_at_end=False"]) == 0
        assert same(other, uninterrupted)

    def test_its_own_later_checkpoints_come_first(self, whole, tmp_path, killed, capsys):
        other = tmp_path / "other"
        killed(6, [f"--resume_from_checkpoint={whole / 'checkpoint-4'}", "--save_steps=1", f"--output_dir={other}"])
        assert train.main([f"--resume_from_checkpoint={other}"]) == 0
        assert f"going on from {other / 'checkpoint-5'}, step 5" in capsys.readouterr().out
        assert same(other, whole)

    def test_a_finished_one_is_not_trained_from_the_beginning(self, whole, tmp_path, capsys):
        other = tmp_path / "other"
        assert train.main([f"--resume_from_checkpoint={whole}", f"--output_dir={other}"]) == 0
        assert train.main([f"--resume_from_checkpoint={other}"]) == 0
        assert "from the beginning" not in capsys.readouterr().out and same(other, whole)

    def test_where_that_checkpoint_is_gone_it_is_refused(self, run, tmp_path, killed, capsys):
        other, gone = tmp_path / "other", run / "checkpoint-4"
        killed(5, [f"--resume_from_checkpoint={gone}", f"--output_dir={other}"])
        shutil.rmtree(gone)
        assert train.main([f"--resume_from_checkpoint={other}"]) == 2
        said = capsys.readouterr().err
        assert f"{other} went on from {gone} and has no checkpoint of its own yet: trainer_state.json is" in said


class TestTheBestAfterAMove:
    @pytest.fixture
    def scores(self, monkeypatch):
        """Accuracies of the evaluations to come."""
        ahead = []

        class Judged:
            def __init__(self, share):
                self.correct = share

        monkeypatch.setattr(Evaluator, "run", lambda self, variant, items, **kwargs: [Judged(ahead.pop(0))])
        return ahead

    @pytest.mark.parametrize("strategy", ["best", "steps"])
    @pytest.mark.parametrize("place", ["moved", "another working folder"])
    def test_it_is_the_result(self, base, flags, tmp_path, monkeypatch, killed, scores, capsys, strategy, place):
        (tmp_path / "home").mkdir()
        monkeypatch.chdir(tmp_path / "home")
        argv = [*flags(output_dir=None, save_steps=1, save_strategy=strategy, disable_final_eval=True), *BEST]
        scores += [0.1, 0.9, 0.2, 0.3, 0.4, 0.5]
        assert train.main([*argv, "--output_dir=uninterrupted"]) == 0
        scores += [0.1, 0.9, 0.2, 0.3]
        killed(5, [*argv, "--output_dir=run"])
        run = Path("run").absolute()
        if place == "moved":
            run = run.rename(tmp_path / "moved")
        else:
            monkeypatch.chdir(tmp_path)
        if strategy == "best":
            assert [path.name for path in checkpoints(run)][0] == "checkpoint-2"
        scores[:] = [0.2, 0.3, 0.4, 0.5] if strategy == "best" else [0.4, 0.5]
        capsys.readouterr()
        assert train.main([f"--resume_from_checkpoint={run}"]) == 0
        said = capsys.readouterr()
        assert "does not exist anymore" not in said.out + said.err and "these are the last weights" not in said.out
        assert same(run, tmp_path / "home" / "uninterrupted") and same(run, run / "checkpoint-2")
        assert json.loads((run / "summary.json").read_text())["best_step"] == 2
