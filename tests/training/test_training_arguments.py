"""Every training argument of transformers works here, or is refused by its name before a model is loaded."""

import json
from dataclasses import MISSING, fields

import pytest
import torch
from transformers import TrainingArguments

from diffmas import eval as evaluate
from diffmas import train
from diffmas.training.rules import REFUSED
from diffmas.training.settings import TrainArguments

#: A value other than the default of every refused argument.
GIVEN = {
    "accelerator_config": '{"split_batches": true}',
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
    "auto_find_batch_size": True,
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "debug": "underflow_overflow",
    "ddp_static_graph": True,
    "deepspeed": "ds.json",
    "do_predict": True,
    "enable_jit_checkpoint": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "fp16": True,
    "fp16_full_eval": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": '{"use_reentrant": false}',
    "hub_always_push": True,
    "hub_model_id": "me/run",
    "hub_private_repo": True,
    "hub_revision": "main",
    "hub_strategy": "end",
    "hub_token": "secret",
    "include_for_metrics": "loss",
    "include_num_input_tokens_seen": True,
    "label_names": "answer",
    "label_smoothing_factor": 0.1,
    "length_column_name": "size",
    "neftune_noise_alpha": 5,
    "optim_target_modules": "all-linear",
    "parallelism_config": None,  # cannot be written on a command line
    "prediction_loss_only": True,
    "push_to_hub": True,
    "save_on_each_node": True,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "max-autotune",
    "use_cache": True,
}

#: What works, and how that is shown: in a run below (by the name of its test), or elsewhere.
SHOWN = {
    "output_dir": "every run",
    "per_device_train_batch_size": "test_gradients_are_those_of_one_process",
    "num_train_epochs": "test_epochs",
    "max_steps": "every run",
    "learning_rate": "test_updates",
    "lr_scheduler_type": "test_updates",
    "lr_scheduler_kwargs": "test_updates",
    "warmup_steps": "test_updates",
    "optim": "test_optimizers_are_resumed_to_the_bit",
    "optim_args": "test_optimizers_are_resumed_to_the_bit",
    "weight_decay": "test_updates",
    "adam_beta1": "test_updates",
    "adam_beta2": "test_updates",
    "adam_epsilon": "test_updates",
    "gradient_accumulation_steps": "every run",
    "max_grad_norm": "test_updates",
    "bf16": "test_bf16_means_a_bfloat16_base_under_a_float32_adapter",
    "tf32": "test_what_this_machine_cannot_do",
    "use_liger_kernel": "test_liger.py",
    "liger_kernel_config": "test_liger.py",
    "torch_empty_cache_steps": "test_other_arguments_at_once",
    "logging_strategy": "test_epochs",
    "logging_steps": "test_other_arguments_at_once",
    "logging_first_step": "test_other_arguments_at_once",
    "log_on_each_node": "test_other_arguments_at_once",
    "logging_nan_inf_filter": "test_not_finite.py",
    "log_level": "test_other_arguments_at_once",
    "log_level_replica": "test_other_arguments_at_once",
    "disable_tqdm": "every run",
    "report_to": "test_a_tracker_is_told",
    "run_name": "test_a_tracker_is_told",
    "project": "test_a_tracker_is_told",
    "trackio_space_id": "test_a_tracker_is_told",
    "trackio_bucket_id": "test_a_tracker_is_told",
    "trackio_static_space_id": "test_a_tracker_is_told",
    "eval_strategy": "test_other_arguments_at_once",
    "eval_steps": "test_other_arguments_at_once",
    "eval_delay": "test_other_arguments_at_once",
    "per_device_eval_batch_size": "every run",
    "eval_on_start": "test_other_arguments_at_once",
    "save_only_model": "test_a_checkpoint_of_the_weights_alone",
    "save_strategy": "test_the_best_checkpoint_is_loaded",
    "save_steps": "test_other_arguments_at_once",
    "save_total_limit": "test_the_best_checkpoint_is_loaded",
    "load_best_model_at_end": "test_the_best_checkpoint_is_loaded",
    "metric_for_best_model": "test_the_best_checkpoint_is_loaded",
    "greater_is_better": "test_the_best_checkpoint_is_loaded",
    "ignore_data_skip": "test_data_is_not_skipped",
    "restore_callback_states_from_checkpoint": "test_data_is_not_skipped",
    "full_determinism": "test_other_arguments_at_once",
    "seed": "test_seeds",
    "data_seed": "test_seeds",
    "use_cpu": "every run",
    "dataloader_drop_last": "test_runs_without_a_step",
    "dataloader_num_workers": "test_other_arguments_at_once",
    "dataloader_pin_memory": "test_other_arguments_at_once",
    "dataloader_persistent_workers": "test_other_arguments_at_once",
    "dataloader_prefetch_factor": "test_other_arguments_at_once",
    "dataloader_multiprocessing_context": "test_other_arguments_at_once",
    "dataloader_in_order": "test_other_arguments_at_once",
    "remove_unused_columns": "always False: the items' fields are the collator's",
    "train_sampling_strategy": "test_seeds",
    "ddp_find_unused_parameters": "test_distributed.py",
    "ddp_bucket_cap_mb": "test_distributed.py",
    "ddp_broadcast_buffers": "test_distributed.py",
    "ddp_backend": "test_distributed.py",
    "ddp_timeout": "test_distributed.py",
    "fsdp": "test_distributed.py",
    "fsdp_config": "test_distributed.py",
    "skip_memory_metrics": "test_other_arguments_at_once",
    "do_train": "what the program does",
    "do_eval": "what the program does",
    "resume_from_checkpoint": "test_resume_is_bit_identical",
    "local_rank": "test_launchers.py",
}  # fmt: skip


@pytest.fixture
def refused(flags, capsys, monkeypatch):
    """`refused(**changes)`: the line a run with these flags ends with, before it has loaded a model."""
    monkeypatch.setattr("diffmas.training.session.build_system", lambda *_: pytest.fail("a model is loaded"))

    def line(**changes):
        try:
            assert train.main(flags(**changes)) == 2
        except SystemExit as stop:
            assert stop.code == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m diffmas.train: error: ") and error.count("\n") == 1
        return error.removeprefix("python -m diffmas.train: error: ").rstrip()

    return line


def test_every_argument_is_decided():
    """A new version of transformers with a new argument fails here: decide what it does."""
    names = {f.name for f in fields(TrainingArguments)}
    assert not names - set(SHOWN) - set(REFUSED)
    assert not set(SHOWN) & set(REFUSED)
    assert GIVEN.keys() == REFUSED.keys()


def test_an_unknown_argument_is_left_to_transformers(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Newer(TrainArguments):
        something_new: bool = False

    assert Newer(output_dir=str(tmp_path), something_new=True).something_new


@pytest.mark.parametrize("name", [name for name, value in GIVEN.items() if value is not None])
def test_refused_arguments(refused, name):
    error = refused(**{name: GIVEN[name]})
    assert error.startswith(f"{name} is ") and "; allowed: " in error
    assert "secret" not in error


def test_arguments_that_no_flag_can_give(tmp_path):
    with pytest.raises(ValueError, match="^parallelism_config is .*; allowed: "):
        TrainArguments(output_dir=str(tmp_path), parallelism_config=object())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_default_of_a_refused_argument_may_be_given(tmp_path, name):
    (field,) = (f for f in fields(TrainingArguments) if f.name == name)
    default = field.default_factory() if field.default is MISSING else field.default
    TrainArguments(output_dir=str(tmp_path), use_cpu=True, **{name: default})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gradient_accumulation_steps=-1), "gradient_accumulation_steps is -1; allowed: integers ≥ 1"),
        (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps is 0; allowed: integers ≥ 1"),
        (dict(max_steps=0), "max_steps is 0; allowed: integers ≥ 1, or -1 for num_train_epochs"),
        (dict(max_steps=-2), "max_steps is -2"),
        (dict(max_steps=-1, num_train_epochs=0), "num_train_epochs is 0.0; allowed: finite numbers > 0"),
        (dict(max_steps=-1, num_train_epochs=-1), "num_train_epochs is -1.0"),
        (dict(max_steps=-1, num_train_epochs="nan"), "num_train_epochs is nan"),
        (dict(max_steps=-1, num_train_epochs="inf"), "num_train_epochs is inf"),
        (dict(per_device_train_batch_size=0), "per_device_train_batch_size is 0; allowed: integers ≥ 1"),
        (dict(per_device_train_batch_size=-8), "per_device_train_batch_size is -8"),
        (dict(per_device_eval_batch_size=0), "per_device_eval_batch_size is 0; allowed: integers ≥ 2"),
        (
            dict(task="three items", dataloader_drop_last=True, per_device_train_batch_size=4),
            "dataloader_drop_last is True, which leaves no batch of 3 items: per_device_train_batch_size is 4",
        ),
    ],
    ids=str,
)
def test_runs_without_a_step(refused, tmp_path, changes, message):
    if changes.get("task"):
        changes = changes | three_items(tmp_path)
    assert refused(**changes).startswith(message)


def three_items(folder):
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)]
    for name in ("items", "held_out"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(task=folder / "items.jsonl", eval_file=folder / "held_out.jsonl", topology="sequential", eval_size=None)


def test_a_dropped_batch_that_is_whole_is_a_step(flags, tmp_path):
    changes = three_items(tmp_path) | dict(dataloader_drop_last=True, per_device_train_batch_size=3)
    assert train.main(flags(**changes, max_steps=1, disable_final_eval=True)) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


def test_an_adapted_batch_is_not_dropped(flags, tmp_path, capsys):
    # Three micro-batches of one item, which --auto_batch puts together to one of eight.
    changes = three_items(tmp_path) | dict(dataloader_drop_last=True, per_device_train_batch_size=1, auto_batch=True)
    assert train.main(flags(**changes, gradient_accumulation_steps=8)) == 2
    assert "which leaves no batch of 3 items: per_device_train_batch_size is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rate=-1e-3), "learning_rate is -0.001; allowed: finite numbers ≥ 0"),
        (dict(learning_rate="nan"), "learning_rate is nan"),
        (dict(learning_rate="inf"), "learning_rate is inf"),
        (dict(weight_decay=-1), "weight_decay is -1.0"),
        (dict(adam_beta1=1), "adam_beta1 is 1.0; allowed: numbers ≥ 0 and < 1"),
        (dict(adam_beta2=-0.1), "adam_beta2 is -0.1"),
        (dict(adam_epsilon=0), "adam_epsilon is 0.0"),
        (dict(max_grad_norm=-1), "max_grad_norm is -1.0"),
        (dict(max_grad_norm="nan"), "max_grad_norm is nan"),
        (dict(warmup_steps=-1), "warmup_steps is -1.0"),
        (dict(warmup_steps=2.5), "warmup_steps is 2.5; allowed: integers ≥ 0, or a share"),
        (dict(save_steps=0), "save_steps is 0.0; allowed: integers ≥ 1, or a share"),
        (dict(save_steps=-1), "save_steps is -1.0"),
        (dict(logging_steps=0), "logging_steps is 0.0"),
        (dict(logging_steps=1.5), "logging_steps is 1.5"),
        (dict(eval_strategy="steps", eval_steps=0), "eval_steps is 0.0"),
        (dict(eval_strategy="steps", eval_steps="nan"), "eval_steps is nan"),
        (dict(eval_delay=-1), "eval_delay is -1.0"),
        (dict(save_total_limit=-1), "save_total_limit is -1; allowed: integers ≥ 1, or 0 for no limit"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=2**32), "seed is 4294967296"),
        (dict(data_seed=-1), "data_seed is -1"),
        (dict(dataloader_num_workers=-1), "dataloader_num_workers is -1"),
        (dict(torch_empty_cache_steps=0), "torch_empty_cache_steps is 0"),
        (dict(memory_limit_gb="nan"), "memory_limit_gb is nan"),
        (dict(ddp_timeout=0), "ddp_timeout is 0"),
    ],
    ids=str,
)
def test_numbers(refused, changes, message):
    assert refused(**changes).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(report_to="wandb"), "report_to has 'wandb': "),
        (dict(report_to="tensorboard"), "report_to has 'tensorboard': "),
        (dict(report_to="notebook"), "report_to has 'notebook'; allowed: none, all, or any of "),
        (dict(run_name="a run"), "run_name is 'a run'; allowed: only with --report_to"),
        (dict(project="a project"), "project is 'a project'; allowed: only with --report_to trackio"),
        (dict(trackio_space_id="a/space"), "trackio_space_id is 'a/space'; allowed: only with"),
        (dict(optim="adamw_bnb_8bit"), "optim is 'adamw_bnb_8bit'; allowed: adamw_torch, "),
        (dict(optim="schedule_free_adamw"), "optim is 'schedule_free_adamw'; allowed: adamw_torch, "),
        (dict(optim="galore_adamw"), "optim is 'galore_adamw'; allowed: adamw_torch, "),
        (dict(optim="magic"), "argument --optim: invalid choice: 'magic' (choose from "),
        (dict(optim_args="amsgrad=True"), "optim_args is 'amsgrad=True'; allowed: name=value of nothing, with adamw"),
        (dict(optim="sgd", optim_args="momentum=much"), "optim is 'sgd' with optim_args 'momentum=much': could not"),
        (dict(optim="sgd", adam_beta1=0.5), "adam_beta1 is 0.5; allowed: only with optim adamw_torch"),
        (
            dict(lr_scheduler_type="magic"),
            "argument --lr_scheduler_type/--lr-scheduler-type: invalid choice: 'magic' (choose from ",
        ),
        (dict(lr_scheduler_type="cosine_with_min_lr"), "lr_scheduler_type is 'cosine_with_min_lr' with"),
        (dict(lr_scheduler_type="warmup_stable_decay"), "lr_scheduler_type is 'warmup_stable_decay' with"),
        (
            dict(lr_scheduler_type="linear", lr_scheduler_kwargs='{"power": 2}'),
            "lr_scheduler_type is 'linear' with lr_scheduler_kwargs {'power': 2}: ",
        ),
        (
            dict(lr_scheduler_type="constant", lr_scheduler_kwargs='{"power": 2}'),
            "lr_scheduler_kwargs is {'power': 2}; allowed: left out, with lr_scheduler_type constant",
        ),
        (dict(lr_scheduler_type="polynomial", learning_rate=0), "lr_scheduler_type is 'polynomial' with"),
        (dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="no"), "lr_scheduler_type is"),
        (
            dict(
                lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch", lr_scheduler_kwargs='{"mode": "min"}'
            ),
            "mode of lr_scheduler_kwargs is 'min'; allowed: 'max'",
        ),
        (dict(load_best_model_at_end=True, eval_strategy="no"), "load_best_model_at_end is True; allowed: with"),
        (dict(load_best_model_at_end=True, eval_strategy="epoch"), "load_best_model_at_end is True; allowed: with"),
        (
            dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, metric_for_best_model="loss"),
            "metric_for_best_model is 'loss'; allowed: accuracy",
        ),
        (dict(metric_for_best_model="eval_loss"), "metric_for_best_model is 'eval_loss'; allowed: accuracy"),
        (
            dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, greater_is_better=False),
            "greater_is_better is False; allowed: True",
        ),
        (dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=4), "--load_best_model_at_end requires"),
        (dict(save_strategy="best", eval_strategy="no"), "save_strategy is 'best'; allowed: best only with"),
        (
            dict(save_strategy="sometimes"),
            "argument --save_strategy/--save-strategy: invalid choice: 'sometimes' (choose from ",
        ),
        (
            dict(eval_strategy="sometimes"),
            "argument --eval_strategy/--eval-strategy: invalid choice: 'sometimes' (choose from ",
        ),
        (
            dict(logging_strategy="sometimes"),
            "argument --logging_strategy/--logging-strategy: invalid choice: 'sometimes' (choose from ",
        ),
        (dict(train_sampling_strategy="batch_rebalance"), "train_sampling_strategy is 'batch_rebalance'; allowed: "),
        (dict(dataloader_persistent_workers=True), "dataloader_persistent_workers is True; allowed: only with"),
        (dict(dataloader_prefetch_factor=2), "dataloader_prefetch_factor is 2; allowed: only with"),
        (dict(dataloader_multiprocessing_context="spawn"), "dataloader_multiprocessing_context is 'spawn'; allowed:"),
        (dict(use_liger_kernel=True), "use_liger_kernel is True"),
        (dict(liger_kernel_config='{"rope": false}'), "liger_kernel_config is {'rope': False}; allowed: only with"),
        (dict(fsdp_config='{"version": 2}'), "fsdp_config is {'version': 2}; allowed: only with --fsdp"),
        (dict(fsdp="full_shard", fsdp_config='{"cpu_offload": true}'), "fsdp_config has ['cpu_offload']; allowed: "),
        (dict(fsdp="full_shard"), "fsdp is True in one process; allowed: False, or several processes"),
        (dict(liger_kernel_config="{rope"), "liger_kernel_config is '{rope', which is not valid JSON: "),
        (dict(lr_scheduler_kwargs="{3}"), "lr_scheduler_kwargs is '{3}', which is not valid JSON: "),
        (dict(ddp_backend="gloo"), "ddp_backend is 'gloo'; allowed: only with several processes"),
        (dict(local_rank=1), "local_rank is 1, LOCAL_RANK is -1; allowed: what torchrun sets"),
    ],
    ids=str,
)
def test_what_does_not_go_together(refused, changes, message):
    assert refused(**changes).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_what_this_machine_cannot_do(refused):
    assert refused(tf32=True).startswith("tf32 is True")


def test_a_comparison_does_not_evaluate_on_the_way(flags, capsys):
    given = [f for f in flags(output_dir=None, use_cpu=None, disable_tqdm=None) if "per_device_eval" not in f]
    best = ["--load_best_model_at_end=True", "--eval_strategy=steps", "--eval_steps=2"]
    assert evaluate.main([*given, *best, "--methods=all", "--run=nowhere"]) == 2
    error = capsys.readouterr().err
    assert "error: load_best_model_at_end is True; allowed: with eval_strategy" in error and error.count("\n") == 1
