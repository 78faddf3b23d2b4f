"""What transformers' training arguments do here: all work as documented there, but for those named below.

An argument that a new transformers version brings is left to it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

_UPLOAD = "its default; a finished run is uploaded with `hf upload REPOSITORY FOLDER`"
_COMPILE = "its default, the layers are fused already (torch.compile would trace every length anew)"
_EVALUATION = "its default, evaluation generates answers (--eval_size, --per_device_eval_batch_size)"
_PARTS = "its default; weights are sharded with --fsdp"

#: Arguments that only have their default, and what is allowed instead.
REFUSED = {
    "accelerator_config": "its default",
    "activation_checkpointing": "False, with --checkpointing prefill or all instead",
    "activation_checkpointing_kwargs": "its default, with --checkpointing prefill or all instead",
    "auto_find_batch_size": "False, with --auto_batch instead",
    "average_tokens_across_devices": "True, every answer token weighs the same",
    "batch_eval_metrics": _EVALUATION,
    "bf16_full_eval": "False; --bf16 True or --dtype bfloat16 hold in evaluation too",
    "debug": "its default",
    "ddp_static_graph": "its default, since gradients are accumulated over several backward passes",
    "deepspeed": _PARTS,
    "do_predict": "False, with python -m diffmas.eval instead",
    "enable_jit_checkpoint": "False; Ctrl-C (SIGINT) saves a checkpoint",
    "eval_accumulation_steps": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "fp16": "--bf16 True or --dtype bfloat16, which need no loss scaling",
    "fp16_full_eval": "--bf16 True or --dtype bfloat16, which hold in evaluation too",
    "gradient_checkpointing": "False, with --checkpointing prefill or all instead",
    "gradient_checkpointing_kwargs": "its default, with --checkpointing prefill or all instead",
    "hub_always_push": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_revision": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_token": _UPLOAD,
    "include_for_metrics": _EVALUATION,
    "include_num_input_tokens_seen": "its default",
    "label_names": "its default, the answer is the label",
    "label_smoothing_factor": "0, the loss is the plain cross-entropy",
    "length_column_name": "its default, lengths are counted",
    "neftune_noise_alpha": "its default; noise would differ in what --checkpointing computes again",
    "optim_target_modules": "its default, with --lora_target_modules instead",
    "parallelism_config": _PARTS,
    "prediction_loss_only": _EVALUATION,
    "push_to_hub": _UPLOAD,
    "save_on_each_node": "False, the first process writes",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_cache": "its default, agents always hand over their caches",
}

#: Optimizers that have been resumed to the bit, and their options (`--optim_args`).
OPTIMIZERS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "sgd": ("momentum", "dampening", "nesterov"),
}
SAMPLING = ("random", "sequential", "group_by_length")
#: Schedules that follow the accuracy instead of the step.
BY_METRIC = ("reduce_lr_on_plateau", "greedy")
_OFF = (None, False, "", "no")
_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_SHARDING = (
    "version", "reshard_after_forward", "cpu_ram_efficient_loading", "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
)  # fmt: skip


def _at_least(least: float) -> Callable[[float], bool]:
    return lambda value: value >= least


def _steps(value: float) -> bool:
    return 0 < value < 1 or (value >= 1 and value == int(value))


_POSITIVE = (_at_least(1), "integers ≥ 1")
_COUNT = (_at_least(0), "integers ≥ 0")
_NOT_NEGATIVE = (_at_least(0), "finite numbers ≥ 0")
_SHARE_OR_STEPS = (_steps, "integers ≥ 1, or a share of all steps between 0 and 1")
_BETA = (lambda value: 0 <= value < 1, "numbers ≥ 0 and < 1")
_SEED = (lambda value: 0 <= value < 2**32, "integers ≥ 0 and < 2³²")
#: What numbers have to be; None is left alone.
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_epsilon": (lambda value: value > 0, "finite numbers > 0"),
    "data_seed": _SEED,
    "dataloader_num_workers": _COUNT,
    "dataloader_prefetch_factor": _POSITIVE,
    "ddp_bucket_cap_mb": _POSITIVE,
    "ddp_timeout": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "eval_steps": _SHARE_OR_STEPS,
    "gradient_accumulation_steps": _POSITIVE,
    "learning_rate": _NOT_NEGATIVE,
    "logging_steps": _SHARE_OR_STEPS,
    "max_grad_norm": _NOT_NEGATIVE,
    "max_steps": (lambda value: value == -1 or value >= 1, "integers ≥ 1, or -1 for num_train_epochs"),
    "memory_limit_gb": (lambda value: value > 0, "> 0"),
    "num_train_epochs": (lambda value: value > 0, "finite numbers > 0"),
    "per_device_eval_batch_size": (_at_least(2), "integers ≥ 2 (a mismatched trace is another row's)"),
    "per_device_train_batch_size": _POSITIVE,
    "save_steps": _SHARE_OR_STEPS,
    "save_total_limit": (_at_least(0), "integers ≥ 1, or 0 for no limit"),
    "seed": _SEED,
    "torch_empty_cache_steps": _POSITIVE,
    "warmup_steps": (lambda value: 0 <= value < 1 or _steps(value), "integers ≥ 0, or a share of all steps below 1"),
    "weight_decay": _NOT_NEGATIVE,
}


def settle(args: TrainingArguments) -> None:
    """Check arguments as they were given, before transformers acts on them; fill in what its defaults get wrong.

    Raises:
        ValueError: an argument that would do nothing, or something other than it says.
    """
    names = {f.name: f for f in fields(args)}
    # The new name first: transformers copies one to the other.
    for name in (n for n in REFUSED if n in names):
        value, default = getattr(args, name), _default(names[name])
        if value != default and (value or default not in _OFF):
            _refuse(args, name, REFUSED[name])
    for name, (right, allowed) in NUMBERS.items():
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and right(value)):
            _refuse(args, name, allowed)
    for name in ("lr_scheduler_kwargs", "fsdp_config", "liger_kernel_config"):
        setattr(args, name, _mapping(name, getattr(args, name)))
    if isinstance(args.report_to, str):
        args.report_to = [name.strip() for name in args.report_to.split(",")]
    best = args.load_best_model_at_end or args.save_strategy == "best" or args.lr_scheduler_type in BY_METRIC
    if best and args.metric_for_best_model is None:
        args.metric_for_best_model = "accuracy"
    for name, holds, allowed in _rules(args):
        if not holds:
            _refuse(args, name, allowed)
    # Every loss is looked at: see diffmas.support.not_finite.
    args.logging_nan_inf_filter = False


def settle_updates(args: TrainingArguments) -> None:
    """Check what transformers has read from texts and files: optimizer, schedule and sharding are tried out.

    Raises:
        ValueError: they cannot be built, or have an option that would be ignored.
    """
    # Its import is slow, and not all programs train.
    from transformers import Trainer

    if ignored := sorted(k for k, v in (args.fsdp_config or {}).items() if v and k not in _SHARDING):
        raise ValueError(f"fsdp_config has {ignored}; allowed: {', '.join(_SHARDING)}")
    # A text where it is no mapping: then no schedule can be built with it.
    kwargs: Any = args.lr_scheduler_kwargs or {}
    if args.lr_scheduler_type in BY_METRIC and isinstance(kwargs, dict):
        args.lr_scheduler_kwargs = kwargs = {"mode": "max", **kwargs}
        if kwargs["mode"] != "max":
            raise ValueError(f"mode of lr_scheduler_kwargs is {kwargs['mode']!r}; allowed: 'max', it follows accuracy")
    if kwargs and args.lr_scheduler_type in ("constant", "constant_with_warmup"):
        _refuse(args, "lr_scheduler_kwargs", f"left out, with lr_scheduler_type {_plain(args.lr_scheduler_type)}")
    trial = torch.nn.Parameter(torch.zeros(1))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([{"params": [trial], "weight_decay": args.weight_decay}], **options)
    except Exception as error:
        raise ValueError(
            _line(f"optim is {_plain(args.optim)!r} with optim_args {args.optim_args!r}: {error}")
        ) from None
    steps = args.max_steps if args.max_steps > 0 else 1000
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, kwargs)
    except Exception as error:
        what = f"lr_scheduler_type is {_plain(args.lr_scheduler_type)!r} with lr_scheduler_kwargs {kwargs!r}"
        raise ValueError(_line(f"{what}: {error}")) from None


def check_batches(args: TrainingArguments, items: int) -> None:
    """Raise `ValueError` where `items` items give no process a whole batch and others are dropped."""
    batch, processes = args.per_device_train_batch_size, args.world_size
    if args.dataloader_drop_last and items // batch < processes:
        raise ValueError(
            f"dataloader_drop_last is True, which leaves no batch of {items} items: per_device_train_batch_size is "
            f"{batch}, processes {processes}; allowed: False, or a smaller batch"
        )


def _rules(args: TrainingArguments) -> Iterator[tuple[str, bool, str]]:
    """Name, whether it is right, what is allowed."""
    optimizer = _plain(args.optim)
    yield "optim", optimizer in OPTIMIZERS, ", ".join(OPTIMIZERS)
    known = OPTIMIZERS.get(optimizer, ())
    given = [pair.partition("=")[0].strip() for pair in (args.optim_args or "").split(",") if pair.strip()]
    yield "optim_args", set(given) <= set(known), f"name=value of {', '.join(known) or 'nothing'}, with {optimizer}"
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        usual = getattr(args, name) == TrainingArguments.__dataclass_fields__[name].default
        yield name, usual or optimizer.startswith("adamw"), "only with optim adamw_torch or adamw_torch_fused"
    yield "train_sampling_strategy", args.train_sampling_strategy in SAMPLING, ", ".join(SAMPLING)

    evaluated, saved = _plain(args.eval_strategy), _plain(args.save_strategy)
    metrics = (None, "accuracy", "eval_accuracy")
    yield "metric_for_best_model", args.metric_for_best_model in metrics, "accuracy"
    yield "greater_is_better", args.greater_is_better is not False, "True, the metric is accuracy"
    together = evaluated != "no" and saved in (evaluated, "best")
    allowed = "with eval_strategy and save_strategy both steps or both epoch, or save_strategy best and evaluation"
    yield "load_best_model_at_end", together or not args.load_best_model_at_end, allowed
    yield "save_strategy", saved != "best" or evaluated != "no", "best only with eval_strategy steps or epoch"
    follows = args.lr_scheduler_type in BY_METRIC
    yield (
        "lr_scheduler_type",
        not follows or evaluated != "no",
        f"{_plain(args.lr_scheduler_type)} only with eval_strategy",
    )

    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_prefetch_factor"):
        yield name, not getattr(args, name) or args.dataloader_num_workers > 0, "only with dataloader_num_workers ≥ 1"
    yield "liger_kernel_config", not args.liger_kernel_config or args.use_liger_kernel, "only with use_liger_kernel"
    yield "tf32", not args.tf32 or torch.cuda.is_available(), "False, without a CUDA GPU"
    yield "fsdp_config", not args.fsdp_config or bool(args.fsdp), "only with --fsdp"
    yield from _trackers(args)


def _trackers(args: TrainingArguments) -> Iterator[tuple[str, bool, str]]:
    names = [name for name in args.report_to if name != "none"]
    yield "run_name", args.run_name is None or bool(names), "only with --report_to"
    for field in (f for f in fields(args) if f.name in _TRACKIO):
        usual = getattr(args, field.name) == _default(field)
        yield field.name, usual or not {"trackio", "all"}.isdisjoint(names), "only with --report_to trackio"
    if names in ([], ["all"]):
        return
    # Its import is slow.
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"report_to has {name!r}; allowed: none, all, or any of {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:
            # What is missing, and how it is installed.
            raise ValueError(_line(f"report_to has {name!r}: {error}")) from None


def _mapping(name: str, value: Any) -> Any:
    """A mapping that is written as JSON; a file's name, or no text at all, is left as it is."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {value!r}, which is not valid JSON: {error}") from None


def _default(field: Field) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


def _plain(value: Any) -> str:
    """A text, or the value of an enumeration of texts."""
    return str(getattr(value, "value", value))


def _refuse(args: TrainingArguments, name: str, allowed: str) -> None:
    value = getattr(args, name)
    shown = "given" if name.endswith("token") else repr(getattr(value, "value", value))
    raise ValueError(f"{name} is {shown}; allowed: {allowed}")


def _line(text: str) -> str:
    return " ".join(text.split())
