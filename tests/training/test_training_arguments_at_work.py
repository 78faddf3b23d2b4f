"""What transformers' training arguments do to a run, those that `test_training_arguments.py` says work."""

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file

from diffmas import train
from diffmas.loading import load_run
from diffmas.runs.files import ADAPTER_FILE
from diffmas.runs.metrics import read_metrics
from diffmas.training import session
from diffmas.training.rules import OPTIMIZERS


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def adapter(folder):
    return load_file(Path(folder, ADAPTER_FILE))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def trained(flags, tmp_path):
    """`trained(name, **changes)`: the folder of a run of 6 steps, without its last evaluation."""

    def run(name, **changes):
        settings = dict(output_dir=tmp_path / name, disable_final_eval=True, logging_steps=1) | changes
        assert train.main(flags(**settings)) == 0
        return tmp_path / name

    return run


def logged(folder, name):
    return [e[name] for e in read_metrics(folder / "metrics.jsonl") if name in e]


def steps(folder, name):
    return [e["step"] for e in read_metrics(folder / "metrics.jsonl") if name in e]


def test_epochs(trained, tmp_path):
    # 12 of 17 items are trained on: 3 micro-batches of 4, so 2 updates an epoch.
    items = "".join(json.dumps({"question": f"{i}?", "answer": str(i)}) + "\n" for i in range(17))
    (tmp_path / "items.jsonl").write_text(items)
    changes = dict(task=tmp_path / "items.jsonl", topology="sequential", eval_size=5, max_steps=-1, save_total_limit=0)
    run = trained("run", num_train_epochs=3, logging_strategy="epoch", save_strategy="epoch", **changes)
    assert summary(run)["steps"] == 6 and steps(run, "loss") == [2, 4, 6]
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    assert summary(trained("part", num_train_epochs=0.1, **changes))["steps"] == 1


def test_updates(trained):
    """Two updates by hand, from the gradient norm of the first and the rates of the schedule."""
    linear = dict(lr_scheduler_type="linear", warmup_steps=2, max_steps=4, max_grad_norm=0)
    run = trained("linear", **linear)
    assert logged(run, "learning_rate") == pytest.approx([0, 5e-3, 1e-2, 5e-3])
    share = trained("share", **linear | dict(warmup_steps=0.5))
    assert logged(share, "learning_rate") == logged(run, "learning_rate")
    cosine = dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs='{"min_lr": 5e-3}', max_steps=4)
    # min + (max - min) (1 + cos(π t / 4)) / 2
    halves = [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    rates = logged(trained("cosine", **cosine, warmup_steps=0), "learning_rate")
    assert rates == pytest.approx([5e-3 + 5e-3 * h for h in halves])

    # The first update of SGD is -rate × gradient × min(1, max_grad_norm / norm); A starts at random, B at zero.
    one = dict(optim="sgd", lr_scheduler_type="constant", warmup_steps=0, max_steps=1, weight_decay=0)
    whole, clipped = (trained(f"norm {n}", **one, max_grad_norm=n) for n in (0, 0.1))
    norm = logged(whole, "grad_norm")[0]
    assert logged(clipped, "grad_norm")[0] == pytest.approx(norm) and norm > 0.1
    for name, value in adapter(whole).items():
        if "lora_B" in name:
            assert value.any() and torch.allclose(adapter(clipped)[name], value * 0.1 / norm, rtol=1e-3)

    # Adam's first update is the sign of the gradient: -rate × g / (|g| + ε), with any β.
    adam = one | dict(optim="adamw_torch", learning_rate=1e-3)
    first = adapter(trained("adam", **adam, adam_beta1=0.5, adam_beta2=0.5, adam_epsilon=1e-12))
    large = adapter(trained("epsilon", **adam, adam_epsilon=1e3))
    for name in (n for n in first if "lora_B" in n):
        moved = first[name][first[name] != 0].abs()
        assert torch.allclose(moved, torch.full_like(moved, 1e-3), rtol=1e-4) and large[name].abs().max() < 1e-5
    # Of A, whose first gradient is zero, decoupled decay leaves 1 - rate × decay.
    plain, decayed = (adapter(trained(f"decay {d}", **adam | dict(weight_decay=d))) for d in (0, 10))
    for name in (n for n in plain if "lora_A" in n):
        assert torch.allclose(decayed[name], plain[name] * (1 - 1e-3 * 10))
    # β matters from the second update on.
    two = adam | dict(max_steps=2)
    assert not same(adapter(trained("β₁", **two, adam_beta1=0)), adapter(trained("usual", **two)))
    assert not same(adapter(trained("β₂", **two, adam_beta2=0)), adapter(trained("usual again", **two)))


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizers_are_resumed_to_the_bit(trained, tmp_path, optim):
    options = {"sgd": "momentum=0.9,nesterov=True", "rmsprop": "momentum=0.5,centered=True", "adagrad": "lr_decay=0.1"}
    changes = dict(optim=optim, optim_args=options.get(optim), max_steps=4)
    whole = trained("whole", **changes)
    resumed = trained("resumed", **changes, resume_from_checkpoint=whole / "checkpoint-2")
    assert same(adapter(whole), adapter(resumed)) and logged(whole, "loss")[2:] == logged(resumed, "loss")
    if optim in options:
        plain = trained("plain", **changes | dict(optim_args=None))
        assert not same(adapter(whole), adapter(plain))


def test_sgd_without_momentum_is_resumed_to_the_bit(trained):
    changes = dict(optim="sgd", max_steps=4, learning_rate=1)
    whole = trained("whole", **changes)
    resumed = trained("resumed", **changes, resume_from_checkpoint=whole / "checkpoint-2")
    assert same(adapter(whole), adapter(resumed))
    assert not same(adapter(whole), adapter(whole / "checkpoint-2"))


def test_seeds(trained):
    first, other = trained("first", max_steps=1), trained("other", max_steps=1, seed=7)
    assert not same(adapter(first), adapter(other))
    # The same adapter at the start, other batches.
    batches = {logged(trained(f"data {seed}", max_steps=1, data_seed=seed), "loss")[0] for seed in (1, 2)}
    order = logged(trained("in order", max_steps=1, train_sampling_strategy="sequential"), "loss")[0]
    assert len(batches | {order}) == 3
    assert logged(trained("again", max_steps=1, data_seed=1), "loss")[0] in batches


def test_other_arguments_at_once(trained):
    before = torch.are_deterministic_algorithms_enabled()
    plain = trained("plain")
    try:
        run = trained(
            "run", logging_steps=2, logging_first_step=True, eval_strategy="steps", eval_steps=1, eval_delay=4,
            eval_on_start=True, save_steps=0.5, save_total_limit=0, torch_empty_cache_steps=2, log_level="error",
            log_level_replica="error", log_on_each_node=False, full_determinism=True, dataloader_num_workers=1,
            dataloader_persistent_workers=True, dataloader_prefetch_factor=3, dataloader_in_order=False,
            dataloader_multiprocessing_context="fork", dataloader_pin_memory=False, skip_memory_metrics=False,
            do_train=True, do_eval=True, remove_unused_columns=False, ddp_find_unused_parameters=True,
            ddp_bucket_cap_mb=1, ddp_broadcast_buffers=True,
        )  # fmt: skip
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before)
    assert same(adapter(run), adapter(plain))
    assert steps(run, "loss") == [1, 2, 4, 6] and steps(run, "eval_accuracy") == [0, 4, 5, 6]
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert "train_mem_cpu_alloc_delta" in read_metrics(run / "metrics.jsonl")[-1]


def test_data_is_not_skipped(trained):
    whole = trained("whole", max_steps=4)
    changes = dict(max_steps=4, resume_from_checkpoint=whole / "checkpoint-2")
    again = trained("again", **changes, ignore_data_skip=True, restore_callback_states_from_checkpoint=True)
    skipped = trained("skipped", **changes, restore_callback_states_from_checkpoint=True)
    assert same(adapter(skipped), adapter(whole)) and not same(adapter(again), adapter(whole))


class Scores:
    """In an evaluator's place: the accuracy at every evaluation."""

    def __init__(self, monkeypatch, of_100):
        self.scores = iter(of_100)
        monkeypatch.setattr(session.Evaluator, "run", self)

    def __call__(self, variant, items, *_):
        right = next(self.scores)
        return [type("R", (), {"correct": i < right})() for i in range(100)]


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        (dict(save_steps=1, eval_steps=1, save_total_limit=1), 3),
        (dict(save_steps=2, eval_steps=2, max_steps=12, metric_for_best_model="eval_accuracy"), 6),
        # The best of all is no checkpoint: the best that is one is.
        (dict(save_steps=2, eval_steps=1), 6),
        (dict(save_strategy="best", eval_steps=1, greater_is_better=True, metric_for_best_model="accuracy"), 3),
    ],
    ids=str,
)
def test_the_best_checkpoint_is_loaded(trained, monkeypatch, changes, best):
    Scores(monkeypatch, [10, 20, 90, 20, 10, 30])
    copies = {}
    original = session.SystemTrainer.save_model

    def keep(self, output_dir=None, _internal_call=False):
        original(self, output_dir, _internal_call)
        copies[self.state.global_step] = adapter(output_dir)

    monkeypatch.setattr(session.SystemTrainer, "save_model", keep)
    run = trained("run", eval_strategy="steps", load_best_model_at_end=True, **changes)
    assert summary(run)["best_step"] == best
    assert same(adapter(run), copies[best]) and not any(same(copies[best], copies[s]) for s in copies if s != best)


def test_a_schedule_follows_the_accuracy(trained, monkeypatch):
    Scores(monkeypatch, [10, 20, 20, 20, 30, 30])
    run = trained(
        "run", eval_strategy="steps", eval_steps=1, lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs='{"patience": 0, "factor": 0.5}',
    )  # fmt: skip
    assert logged(run, "learning_rate") == pytest.approx([1e-2, 1e-2, 1e-2, 5e-3, 2.5e-3, 2.5e-3])


def test_a_checkpoint_of_the_weights_alone(trained, flags, capsys):
    run = trained("run", save_only_model=True)
    names = {p.name for p in (run / "checkpoint-6").iterdir()}
    assert ADAPTER_FILE in names and "optimizer.pt" not in names
    assert train.main(flags(resume_from_checkpoint=run / "checkpoint-4")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-4': optimizer.pt is missing, as save_only_model leaves it" in error


def test_a_tracker_is_told(trained, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append((args.run_name, args.project, args.trackio_space_id, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    run = trained("run", report_to="wandb, trackio", run_name="mine", project="ours", trackio_space_id="a/space")
    assert {t[:3] for t in told} == {("mine", "ours", "a/space")}
    assert [t[3]["loss"] for t in told[::2] if "loss" in t[3]] == logged(run, "loss")


def test_a_run_without_a_best_checkpoint_says_so(trained, capsys):
    run = trained(
        "run", load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch", max_steps=3, eval_delay=9
    )
    assert "no checkpoint was evaluated: these are the last weights" in capsys.readouterr().out
    assert summary(run)["best_step"] is None and same(adapter(run), adapter(run / "checkpoint-3"))


def test_matrices_b_learn_faster(flags, tmp_path, monkeypatch):
    """LoRA+: their groups have a learning rate of their own, in the schedule too, and a run goes on with it."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        seen.append([(len(g["params"]), g["lr"]) for g in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    given = dict(loraplus_lr_ratio=4, lr_scheduler_type="linear", optim="adamw_torch", disable_final_eval=True)
    assert train.main(flags(**given)) == 0
    for groups in seen:
        rates = sorted({rate for _, rate in groups})
        assert len(rates) == 2 and rates[1] == pytest.approx(4 * rates[0])
        assert sum(n for n, rate in groups if rate == rates[0]) == sum(n for n, rate in groups if rate == rates[1])
    whole, all_steps = load_file(tmp_path / "run" / "adapter_model.safetensors"), list(seen)
    seen.clear()
    there = tmp_path / "run" / "checkpoint-4"
    assert train.main(flags(**given, output_dir=tmp_path / "again", resume_from_checkpoint=there)) == 0
    # torch loads a state into an optimizer by a step that changes nothing.
    assert seen[-2:] == all_steps[4:]
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    other = dict(loraplus_lr_ratio=1, output_dir=tmp_path / "other", resume_from_checkpoint=there)
    assert train.main(flags(disable_final_eval=True, **other)) == 2


def test_rank_stabilised(flags, tmp_path):
    assert train.main(flags(use_rslora=True, lora_r=4, lora_alpha=8, max_steps=1, disable_final_eval=True)) == 0
    system = load_run(tmp_path / "run").system
    (scaling,) = {m.scaling["default"] for m in system.modules() if isinstance(m, Linear)}
    assert scaling == 8 / 4**0.5


@pytest.mark.parametrize("ratio", [0, -1, "inf", "nan"])
def test_a_learning_rate_of_no_size(flags, ratio, capsys):
    assert train.main(flags(loraplus_lr_ratio=ratio)) == 2
    assert "loraplus_lr_ratio is" in capsys.readouterr().err
