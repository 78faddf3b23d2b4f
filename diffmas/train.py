"""`python -m diffmas.train`: train a multi-agent system and evaluate what its traces carry."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, set_seed

from diffmas.arguments import ERRORS, DecodingArguments, Parser, TrainArguments, parse
from diffmas.batching import ItemLengths, adapt, autocast_dtype, print_fit
from diffmas.data import Collator
from diffmas.distributed import (
    asked_sharding,
    decided_by_first,
    gathered,
    is_sharded,
    process,
    processes,
    settle_sharding,
)
from diffmas.evaluation import VARIANTS, Evaluator, evaluate_all
from diffmas.generation import Decoding
from diffmas.liger import fuse_liger
from diffmas.machine import machine, peak_memory_mb
from diffmas.needs import check_prompts, print_left_out, roles_of, variants_left_out
from diffmas.precision import check_base, settle_precision
from diffmas.profiling import ProfileStep
from diffmas.prompts.dates import kept_date, print_date, today
from diffmas.records import write_atomically
from diffmas.report import accuracy_fields, print_accuracies, write_records, write_report, write_summary
from diffmas.runs import ADAPTER_FILE, SYSTEM_FILE, SystemArguments, build_system, describe, save_weights
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Task, TaskArguments, load_task
from diffmas.topology import Topology, load_topology
from diffmas.training import Items, MetricsFile, StopOnInterrupt, SystemTrainer

PROGRAM = "python -m diffmas.train"
EVAL_DURING_TRAINING = 256
#: Of the training arguments, besides the seed, what decides which weights come out.
WEIGHT_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
    "weight_decay", "max_grad_norm", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy", "data_seed",
    "dataloader_drop_last", "bf16", "fp16",
)  # fmt: skip
MakeCollator = Callable[[MultiAgentSystem, Task, PreTrainedTokenizerBase], Collator]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, write the run's folder. Returns the process's exit status: 130 after Ctrl-C."""
    arguments = parse_arguments(argv)
    try:
        return train(*arguments)
    except ERRORS as error:
        where = f" in process {process()}" if process() else ""
        print(f"{PROGRAM}: error{where}: {error}", file=sys.stderr)
        return 2


def parse_arguments(
    argv: Sequence[str] | None, prog: str = PROGRAM
) -> tuple[SystemArguments, TaskArguments, DecodingArguments, TrainArguments]:
    """The flags of a training; exits with a message on a bad one."""
    kinds = (SystemArguments, TaskArguments, DecodingArguments, TrainArguments)
    return parse(Parser(kinds, prog=prog, description=__doc__), argv)


def train(
    system_args: SystemArguments,
    task_args: TaskArguments,
    decoding_args: DecodingArguments,
    args: TrainArguments,
    *,
    topology: Topology | None = None,
    collator: MakeCollator = lambda system, task, tokenizer: Collator(system.topology, task.prompts, tokenizer),
) -> int:
    """Train as `main` does; `topology` instead of the one `system_args` name, `collator` to make training batches."""
    started = time.perf_counter()
    if args.gradient_checkpointing:
        raise ValueError("gradient_checkpointing is True; allowed: False, with --checkpointing prefill or all instead")
    if settle_sharding(args) and system_args.quantization != "none":
        raise ValueError(f"quantization is {system_args.quantization!r} with FSDP; allowed: none, or data parallel")
    adapting = args.auto_batch or system_args.checkpointing == "auto"
    if adapting and (sharding := asked_sharding(args)):
        raise ValueError(
            f"auto_batch is {args.auto_batch}, checkpointing {system_args.checkpointing!r} with {sharding}; allowed: "
            "both without it, since they need whole weights in every process; with it, neither auto_batch nor auto"
        )
    settle_precision(system_args, args)
    decoding = Decoding(**asdict(decoding_args), seed=args.seed)
    task_args = decided_by_first(lambda: replace(task_args, date=task_args.date or _own_date(args) or today()))
    task = load_task(task_args)
    topology = topology or load_topology(system_args.topology, system_args.handover)
    if len(task.train) == 0:  # reads the items, before a model is loaded for nothing
        raise ValueError("the training set is empty; allowed: at least one item")
    check_prompts(task, roles_of(topology), training=True)
    left_out = {} if args.disable_final_eval else variants_left_out(task, topology)
    if process() == 0:
        print_left_out(left_out)
    if not args.disable_final_eval or args.eval_strategy != "no":
        task.ready()
    set_seed(args.seed)
    system, tokenizer = build_system(system_args, topology)
    check_base(system.language_model.dtype)
    if process() == 0:
        print_date(tokenizer, task_args.date)
    if args.use_liger_kernel:
        fuse_liger(system.model, args.device, args.liger_kernel_config)
        # Done: the Trainer would look for a transformers model and find a system.
        args.use_liger_kernel = False
    description = describe(system, system_args, task_args, asdict(decoding_args))
    description["training"] = {"seed": args.seed, **weight_settings(args)}
    collate = collator(system, task, tokenizer)
    lengths = ItemLengths(task.train, collate, show_progress=not args.disable_tqdm)
    fitted: dict[str, Any] = {}
    if adapting:
        fitted["fit"] = asdict(adapt(system, args, lengths, checkpointing=system_args.checkpointing))
        print_fit(args, fitted["fit"])
    args.output_dir, checkpoint = decided_by_first(lambda: _choose_folder(args, task.name, description))

    evaluator = Evaluator(system, tokenizer, task, decoding, batch_size=args.per_device_eval_batch_size)
    args.remove_unused_columns = False
    args.dataloader_pin_memory = torch.cuda.is_available()
    stop = StopOnInterrupt()
    trainer = SystemTrainer(
        model=system,
        args=args,
        train_dataset=Items(task.train),
        eval_dataset=Subset(Items(task.eval), range(min(EVAL_DURING_TRAINING, len(task.eval)))),
        data_collator=collate,
        evaluator=evaluator,
        lengths=lengths,
        callbacks=[MetricsFile(), stop, *([ProfileStep(system, autocast_dtype(args))] if args.profile else [])],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    first = trainer.is_world_process_zero()
    if stop.interrupted:
        if first:
            print(f"stopped at step {trainer.state.global_step}; go on with --resume_from_checkpoint {args.output_dir}")
        return 130
    folder = Path(args.output_dir)
    save_weights(system, folder)
    summary: dict[str, Any] = {}
    if not args.disable_final_eval:
        variants = [variant for variant in VARIANTS if variant not in left_out]
        accuracies, records = evaluate_all(evaluator, variants, show_progress=first and not args.disable_tqdm)
        if first:
            write_records(folder, records)
        summary.update(accuracy_fields(accuracies), eval_items=len(task.eval), left_out=left_out)
    peak = max(gathered([peak_memory_mb()]))
    if not first:
        return 0
    summary.update(
        seconds=round(time.perf_counter() - started, 1),
        peak_memory_mb=round(peak),
        steps=trainer.state.global_step,
        parameters_trained=sum(p.numel() for p in system.parameters() if p.requires_grad),
        machine=machine(),
        parallel=("fsdp2" if is_sharded(system) else "ddp") if processes() > 1 else None,
        **fitted,
        **description,
    )
    write_summary(folder, summary)
    report = write_report(folder)
    print_accuracies(summary)
    Console().print(f"{summary['seconds']} s, {summary['peak_memory_mb']} MB at most; report: {report}")
    return 0


def _choose_folder(args: TrainArguments, name: str, description: dict[str, Any]) -> tuple[str, str | None]:
    """The run's folder and the checkpoint to resume from; nothing finished is overwritten."""
    resume, output_dir = args.resume_from_checkpoint, args.output_dir
    if resume is not None:
        folder = Path(resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint is {resume!r}: no such folder")
        if not (folder / "trainer_state.json").is_file():
            checkpoint = last_checkpoint(folder)
            if checkpoint is None:
                raise FileNotFoundError(f"resume_from_checkpoint is {resume!r}: it holds no checkpoint")
            folder = checkpoint
        output_dir = output_dir or str(folder.parent)
        _check_same(folder.parent / SYSTEM_FILE, description)
    elif output_dir is None:
        candidates = (Path("runs", name if i == 1 else f"{name}-{i}") for i in range(1, sys.maxsize))
        output_dir = str(next(c for c in candidates if not c.exists()))
    elif any(Path(output_dir).glob("checkpoint-*")) or Path(output_dir, ADAPTER_FILE).exists():
        raise ValueError(
            f"output_dir is {output_dir!r}, which holds a run already; allowed: another folder, or "
            f"--resume_from_checkpoint {output_dir}"
        )
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(output_dir, SYSTEM_FILE), json.dumps(description, indent=2) + "\n")
    return output_dir, None if resume is None else str(folder)


def _own_date(args: TrainArguments) -> str | None:
    """The date that the run to resume keeps, if there is one."""
    resume = Path(args.resume_from_checkpoint or "")
    return kept_date([resume / SYSTEM_FILE, resume.parent / SYSTEM_FILE]) if args.resume_from_checkpoint else None


def weight_settings(args: TrainArguments) -> dict[str, Any]:
    """The arguments named in :data:`WEIGHT_SETTINGS`, ready for JSON."""
    settings = {k: v for k, v in args.to_dict().items() if k in WEIGHT_SETTINGS}
    # As one value: settings that only one of two runs has do not count as a difference.
    return {k: json.dumps(v, sort_keys=True) if isinstance(v, dict) else v for k, v in settings.items()}


def last_checkpoint(folder: str | Path) -> Path | None:
    """The latest checkpoint in a run's folder that was written to its end."""
    checkpoints = Path(folder).glob("checkpoint-*[0-9]")
    for path in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            # The Trainer writes its state last.
            json.loads((path / "trainer_state.json").read_text())
            return path
        except (FileNotFoundError, json.JSONDecodeError):
            continue
    return None


def _check_same(path: Path, description: dict[str, Any]) -> None:
    """Raise `ValueError` where a run is resumed with a system or task other than its own."""
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    for part in ("system", "topology", "task"):
        for key, value in description[part].items():
            if (was := before.get(part, {}).get(key, value)) != value:
                raise ValueError(f"{key} is {value!r}, but the run to resume had {was!r}; allowed: the same")


if __name__ == "__main__":
    sys.exit(main())
