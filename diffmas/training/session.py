"""One training from its settings to its report: what `python -m diffmas.train` does."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, set_seed

from diffmas.agents.collator import Collator
from diffmas.agents.thinking import budget
from diffmas.agents.topology import Topology
from diffmas.evaluation.evaluator import TEXT, VARIANTS, Evaluator, evaluate_all
from diffmas.evaluation.methods.base import TraceChannel
from diffmas.evaluation.needs import check_prompts, other_modes, print_left_out, roles_of, variants_left_out
from diffmas.evaluation.report import (
    accuracy_fields,
    carried,
    cut_by_length,
    print_accuracies,
    write_records,
    write_report,
    write_summary,
)
from diffmas.generation import Decoding
from diffmas.loading import build_system
from diffmas.models.liger import check_liger, fuse_liger
from diffmas.prompts.dates import print_date, today
from diffmas.prompts.shortened import cut_line, cut_summary
from diffmas.runs.description import content, describe, read_description, write_description
from diffmas.runs.files import ADAPTER_FILE, SYSTEM_FILE, all_adapter_folders
from diffmas.runs.models import check_sources, sources
from diffmas.runs.settings import SystemArguments
from diffmas.runs.weights import save_weights
from diffmas.support.distributed import (
    asked_sharding,
    decided_by_first,
    gathered,
    is_sharded,
    process,
    processes,
    settle_sharding,
)
from diffmas.support.folders import check_output
from diffmas.support.lock import locked
from diffmas.support.machine import machine, peak_memory_mb
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Task, TaskArguments, load_task
from diffmas.training.batching import ItemLengths, adapt, autocast_dtype, print_fit
from diffmas.training.checkpoints import clear_staging, put_in_place, set_aside, stage_best, step_of, trained_with
from diffmas.training.latent_gradients import LatentGradients
from diffmas.training.precision import check_base, settle_precision
from diffmas.training.preflight import (
    adapter_copies,
    check_evaluation,
    check_training_memory,
    check_training_positions,
    length_bound,
)
from diffmas.training.profiling import ProfileStep
from diffmas.training.restating import check_restating
from diffmas.training.resuming import check_same, checkpoint_of, given_settings, origin, run_folder
from diffmas.training.rules import check_batches
from diffmas.training.settings import DecodingArguments, TrainArguments
from diffmas.training.trainer import Items, MetricsFile, StopOnInterrupt, SystemTrainer

EVAL_DURING_TRAINING = 256
#: Of the training arguments, besides the seed, what decides which weights come out.
WEIGHT_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
    "weight_decay", "max_grad_norm", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy", "data_seed",
    "dataloader_drop_last", "bf16", "fp16", "loraplus_lr_ratio", "restate_steps",
)  # fmt: skip
MakeCollator = Callable[[MultiAgentSystem, Task, PreTrainedTokenizerBase], Collator]


def train(
    system_args: SystemArguments,
    task_args: TaskArguments,
    decoding_args: DecodingArguments,
    args: TrainArguments,
    *,
    topology: Topology | None = None,
    collator: MakeCollator = lambda system, task, tokenizer: Collator(
        system.topology, task.prompts, tokenizer, system.other_tokenizers
    ),
) -> int:
    """Train as `main` does; `topology` instead of the one `system_args` name, `collator` to make training batches."""
    started = time.perf_counter()
    topology = topology or system_args.load_topology()
    _check_arguments(system_args, topology, decoding_args, args)
    task, task_args, left_out = _load_task(task_args, topology, args)
    set_seed(args.seed)
    system, tokenizer = build_system(system_args, topology, copies=adapter_copies(args))
    if decoding_args.max_new_tokens is None:
        decoding_args = replace(decoding_args, max_new_tokens=budget(task.prompts, topology, tokenizer))
    decoding = Decoding(**asdict(decoding_args), seed=args.seed)
    for model in system.models.values():
        check_base(model.language_model.dtype)
    if process() == 0:
        print_date(tokenizer, task_args.date)
    if args.use_liger_kernel:
        for model in system.models.values():
            fuse_liger(model.model, args.device, _liger_parts(args))
        # Done: the Trainer would look for a transformers model and find a system.
        args.use_liger_kernel = False
    description = describe(system, system_args, task_args, asdict(decoding_args))
    description["training"] = {"seed": args.seed, **weight_settings(args)}
    description["arguments"] = given_settings(args)
    description |= content(task)
    collate = collator(system, task, tokenizer)
    lengths = ItemLengths(task.train, collate, show_progress=not args.disable_tqdm)
    _check_size(system, task, tokenizer, collate, lengths, decoding, args)
    fitted: dict[str, Any] = {}
    if _adapting(system_args, args):
        fitted["fit"] = asdict(adapt(system, args, lengths, checkpointing=system_args.checkpointing))
        print_fit(args, fitted["fit"])
        check_batches(args, len(task.train))
    evaluator = Evaluator(
        system, tokenizer, task, decoding,
        batch_size=args.per_device_eval_batch_size, max_message_tokens=args.max_message_tokens,
    )  # fmt: skip
    with contextlib.ExitStack() as held:
        args.output_dir, checkpoint, description = decided_by_first(lambda: _open_folder(args, task, description, held))
        trainer = _run(system, task, evaluator, collate, lengths, args, checkpoint)
        if trainer is None:
            return 130
        folder = Path(args.output_dir)
        save_weights(system, folder)
        summary = {} if args.disable_final_eval else _final_evaluation(evaluator, topology, args, folder, left_out)
        peak = max(gathered([peak_memory_mb()]))
        cut = cut_summary(task.prompts)
        if not trainer.is_world_process_zero():
            return 0
        if line := cut_line(cut):
            print(line)
        summary |= {
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_mb": round(peak),
            "steps": trainer.state.global_step,
            **({"best_step": trainer.state.best_global_step} if args.load_best_model_at_end else {}),
            "parameters_trained": sum(p.numel() for p in system.parameters() if p.requires_grad),
            "machine": machine(),
            "parallel": ("fsdp2" if is_sharded(system) else "ddp") if processes() > 1 else None,
            **({"cut": cut} if cut else {}),
            **fitted,
            **{k: v for k, v in description.items() if k != "prompts"},
        }
        write_summary(folder, summary)
        report = write_report(folder)
    print_accuracies(summary)
    Console().print(f"{summary['seconds']} s, {summary['peak_memory_mb']} MB at most; report: {report}")
    return 0


def _adapting(system_args: SystemArguments, args: TrainArguments) -> bool:
    return args.auto_batch or system_args.checkpointing == "auto"


def _liger_parts(args: TrainArguments) -> Mapping[str, bool] | None:
    # A text was read when the arguments were settled.
    return cast("Mapping[str, bool] | None", args.liger_kernel_config)


def _check_arguments(
    system_args: SystemArguments, topology: Topology, decoding_args: DecodingArguments, args: TrainArguments
) -> None:
    """What can be said of the arguments before anything is loaded; settles sharding and precision in them."""
    check_sources(system_args, topology)
    quantized = [
        kind for source in sources(system_args, topology).values() if (kind := source["quantization"]) != "none"
    ]
    if args.output_dir is not None:
        check_output(args.output_dir, "output_dir")
    if settle_sharding(args) and quantized:
        raise ValueError(f"quantization is {quantized[0]!r} with FSDP; allowed: none, or data parallel")
    if _adapting(system_args, args) and (sharding := asked_sharding(args)):
        raise ValueError(
            f"auto_batch is {args.auto_batch}, checkpointing {system_args.checkpointing!r} with {sharding}; allowed: "
            "both without it, since they need whole weights in every process; with it, neither auto_batch nor auto"
        )
    if args.fsdp and processes() == 1:
        raise ValueError("fsdp is True in one process; allowed: False, or several processes (torchrun)")
    settle_precision(system_args, args)
    if args.use_liger_kernel:
        check_liger(args.device, _liger_parts(args))
    Decoding(**{name: value for name, value in asdict(decoding_args).items() if value is not None})


def _load_task(
    task_args: TaskArguments, topology: Topology, args: TrainArguments
) -> tuple[Task, TaskArguments, dict[str, str]]:
    """The task with the topology's prompts, its arguments with date and checker, and the variants that do not apply.

    Its items are read and checked here, before a model is loaded for nothing.
    """
    task_args = decided_by_first(lambda: replace(task_args, date=task_args.date or today()))
    task = load_task(task_args)
    task = replace(task, prompts=task.prompts.with_roles(topology.prompts))
    if len(task.train) == 0:
        raise ValueError("the training set is empty; allowed: at least one item")
    check_batches(args, len(task.train))
    check_restating(topology, args.restate_steps, _steps(args, len(task.train)))
    check_prompts(task, roles_of(topology), training=True)
    left_out = {} if args.disable_final_eval else variants_left_out(task, topology)
    if args.max_message_tokens is None:
        left_out = {variant: why for variant, why in left_out.items() if variant not in TEXT}
    if process() == 0:
        print_left_out(left_out)
    if _evaluates(args):
        task.ready()
    return task, replace(task_args, checker=task.checker), left_out


def _evaluates(args: TrainArguments) -> bool:
    return not args.disable_final_eval or args.eval_strategy != "no"


def _check_size(
    system: MultiAgentSystem,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    collate: Collator,
    lengths: ItemLengths,
    decoding: Decoding,
    args: TrainArguments,
) -> None:
    """Whether the longest row fits into memory and into the model's positions, in training and in evaluation."""
    own_prompts = Collator(system.topology, task.prompts, tokenizer, system.other_tokenizers)
    own_lengths = lengths if type(collate) in (Collator, TraceChannel) else ItemLengths(task.train, own_prompts)
    bound = length_bound(own_prompts, task.train)
    check_training_memory(system, args, 1 if args.auto_batch else args.per_device_train_batch_size, own_lengths, bound)
    check_training_positions(system, own_lengths, bound)
    if _evaluates(args):
        check_evaluation(system, own_prompts, task.eval, decoding, args.per_device_eval_batch_size)


def _run(
    system: MultiAgentSystem,
    task: Task,
    evaluator: Evaluator,
    collate: Collator,
    lengths: ItemLengths,
    args: TrainArguments,
    checkpoint: str | None,
) -> SystemTrainer | None:
    """The trainer after its last step; None where it was interrupted."""
    if checkpoint is not None:
        # It was evaluated before its first step.
        args.eval_on_start = False
    stop, gradients = StopOnInterrupt(), LatentGradients(system)
    profiling = [ProfileStep(system, autocast_dtype(args))] if args.profile else []
    trainer = SystemTrainer(
        model=system,
        args=args,
        train_dataset=Items(task.train),
        eval_dataset=Subset(Items(task.eval), range(min(EVAL_DURING_TRAINING, len(task.eval)))),
        data_collator=collate,
        evaluator=evaluator,
        lengths=lengths,
        callbacks=[gradients, MetricsFile(gradients.take), stop, *profiling],
    )
    if checkpoint is not None and step_of(checkpoint) >= _steps(args, len(task.train)):
        trainer.finish_from(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    first = trainer.is_world_process_zero()
    if stop.interrupted:
        if first:
            way = f"go on with --resume_from_checkpoint {args.output_dir}"
            if args.save_only_model:
                way = "the checkpoint holds weights alone (save_only_model): nothing can go on from it"
            print(f"stopped at step {trainer.state.global_step}; {way}")
        return None
    if first and args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        print("load_best_model_at_end: no checkpoint was evaluated: these are the last weights")
    return trainer


def _final_evaluation(
    evaluator: Evaluator, topology: Topology, args: TrainArguments, folder: Path, left_out: Mapping[str, str]
) -> dict[str, Any]:
    """What the summary says of every variant; the records are in the folder."""
    first = process() == 0
    asked = VARIANTS if args.max_message_tokens is None else VARIANTS | TEXT
    variants = [variant for variant in asked if variant not in left_out]
    variants += other_modes(evaluator.task, topology, evaluator.tokenizer)
    accuracies, records = evaluate_all(evaluator, variants, show_progress=first and not args.disable_tqdm)
    if first:
        write_records(folder, records)
    return {
        **accuracy_fields(accuracies),
        "cut_by_length": cut_by_length(records),
        **({"carried": said} if (said := carried(records)) else {}),
        "eval_items": len(evaluator.task.eval),
        "left_out": left_out,
    }


def _steps(args: TrainArguments, items: int) -> int:
    """Optimizer steps of the whole training."""
    if args.max_steps > 0:
        return args.max_steps
    batches = items / (args.per_device_train_batch_size * processes())
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))


def _open_folder(
    args: TrainArguments, task: Task, description: dict[str, Any], held: contextlib.ExitStack
) -> tuple[str, str | None, dict[str, Any]]:
    """The run's folder, held against others; the checkpoint to go on from; the description that is written there.

    Nothing finished is overwritten: where no step is left to train, the settings stay those that the weights were
    trained with; where some are, a finished run's adapter is set aside until they are.
    """
    resume, output_dir, checkpoint = args.resume_from_checkpoint, args.output_dir, None
    before: dict[str, Any] = {}
    run = None if resume is None else run_folder(resume, output_dir)
    if run is not None:
        output_dir = output_dir or str(run)
        if run.is_dir() and Path(output_dir).resolve() == run.resolve():
            held.enter_context(locked(output_dir))
        checkpoint = checkpoint_of(resume, run)
        if (run / SYSTEM_FILE).is_file():
            for note in check_same(before := read_description(run), description):
                print(note)
    elif output_dir is None:
        candidates = (Path("runs", task.name if i == 1 else f"{task.name}-{i}") for i in range(1, sys.maxsize))
        output_dir = str(next(c for c in candidates if not c.exists()))
    elsewhere = run is None or Path(output_dir).resolve() != run.resolve()
    if elsewhere and (any(Path(output_dir).glob("checkpoint-*")) or Path(output_dir, ADAPTER_FILE).exists()):
        raise ValueError(
            f"output_dir is {output_dir!r}, which holds a run already; allowed: another folder, or "
            f"--resume_from_checkpoint {output_dir}"
        )
    if elsewhere:
        held.enter_context(locked(output_dir))
    clear_staging(output_dir)
    step = 0 if checkpoint is None else step_of(checkpoint)
    left, finished = step < _steps(args, len(task.train)), Path(output_dir, ADAPTER_FILE)
    best = stage_best(checkpoint, output_dir) if checkpoint is not None and args.load_best_model_at_end else None
    if checkpoint is not None:
        description |= origin(checkpoint, output_dir)
    if not left:
        print("no step is left to train: the run's training settings stay as they were")
        description |= trained_with(checkpoint, before)
    elif finished.is_file():
        folders = all_adapter_folders(output_dir, Topology.from_dict(description["topology"]))
        # The run's own last: without it, the run is not finished.
        for path in (folder / ADAPTER_FILE for folder in reversed(folders)):
            if path.is_file():
                path.rename(old := path.with_suffix(".old.safetensors"))
                print(f"{path} is kept as {old.name}")
    if not elsewhere:
        for path in set_aside(output_dir, step):
            print(f"{path} is kept as {path.name}.old")
    # Before anything that a later training could take for this one's: it says what this one goes on from.
    write_description(output_dir, description, task.prompts)
    if best is not None:
        put_in_place(best, output_dir)
    return output_dir, None if checkpoint is None else str(checkpoint), description


def weight_settings(args: TrainArguments) -> dict[str, Any]:
    """The arguments named in :data:`WEIGHT_SETTINGS`, ready for JSON."""
    settings = {k: v for k, v in args.to_dict().items() if k in WEIGHT_SETTINGS}
    # As one value: settings that only one of two runs has do not count as a difference.
    return {k: json.dumps(v, sort_keys=True) if isinstance(v, dict) else v for k, v in settings.items()}
