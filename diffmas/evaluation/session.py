"""One evaluation of a run from its settings to its report: what `python -m diffmas.eval` does without `--methods`."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from diffmas.agents.thinking import switched
from diffmas.evaluation.deferred import deferred
from diffmas.evaluation.evaluator import LABELS, MODES, TEXT, VARIANTS, Evaluator, evaluate_all, evaluate_deferred
from diffmas.evaluation.needs import check_prompts, other_modes, print_left_out, roles_of, variants_left_out
from diffmas.evaluation.records import Record, UnfinishedRecords
from diffmas.evaluation.report import (
    accuracy_fields,
    carried,
    cut_by_length,
    print_accuracies,
    write_records,
    write_report,
    write_summary,
)
from diffmas.evaluation.settings import EvalArguments
from diffmas.generation import Decoding
from diffmas.loading import Run, load_run
from diffmas.prompts.dates import print_date
from diffmas.prompts.shortened import cut_line, cut_summary
from diffmas.runs.description import describe
from diffmas.serving.options import OWN, VLLM, engine_options
from diffmas.support.distributed import gathered, process
from diffmas.support.folders import check_output
from diffmas.support.launch import check_alone, join
from diffmas.support.lock import locked
from diffmas.support.machine import machine, peak_memory_mb
from diffmas.tasks import Task, TaskArguments, load_task
from diffmas.tasks.base import IN_PYTHON, JSONL
from diffmas.tasks.content import fingerprint


def evaluate(args: EvalArguments) -> int:
    """Evaluate, print a table, write records, summary and report. Returns the process's exit status.

    Raises:
        ValueError: an argument that would be ignored, or does not fit the run.
        FileNotFoundError: a folder that holds no finished run.
    """
    args.check_used()
    if args.engine == VLLM:
        check_alone(f"--engine {VLLM}")
    started = time.perf_counter()
    variants = _asked(args)
    # Under torchrun, this joins the other processes.
    device = join()
    folder = Path(args.output_dir or Path(args.run, "eval"))
    check_output(folder, "output_dir")
    run = load_run(args.run, args.model_name_or_path, args.gguf_file)
    set_seed(args.seed)
    task_args = _task_arguments(args, run)
    given = {k: v for k in ("max_new_tokens", "temperature", "top_p") if (v := getattr(args, k)) is not None}
    decoding = Decoding(**{**run.decoding, **given, "seed": args.seed})
    run.system.to(device)
    in_python = run.task.task == IN_PYTHON
    task = load_task(task_args) if in_python else load_held_out(task_args, run.task.eval_size)
    task = replace(task, prompts=task.prompts.with_roles(run.system.topology.prompts))
    check_prompts(task, roles_of(run.system.topology), training=False)
    left_out = {v: why for v, why in variants_left_out(task, run.system.topology).items() if v in variants}
    for variant, reason in left_out.items():
        if args.variants:
            raise ValueError(f"variants has {variant!r}: {reason}; allowed: {', '.join(LABELS.keys() - left_out)}")
    if any(variant in MODES for variant in variants):
        switched(run.system.topology, run.tokenizer, True)
    task.ready()
    if args.eval_size is None and run.data.get("eval", same := fingerprint(task.eval)) != same and process() == 0:
        print(f"the held-out items are not those of {args.run}'s own evaluation")
    evaluator = Evaluator(
        run.system,
        run.tokenizer,
        task,
        decoding,
        batch_size=args.batch_size,
        max_message_tokens=args.max_message_tokens,
    )
    first = process() == 0
    if first:
        print_date(run.tokenizer, task_args.date)
        print_left_out(left_out)
    variants = [variant for variant in variants if variant not in left_out]
    if args.variants is None:
        variants += other_modes(task, run.system.topology, run.tokenizer)
    description = describe(run.system, run.args, task_args, run.decoding)
    with locked(folder) if first else contextlib.nullcontext():
        if args.engine == VLLM:
            accuracies, records = _on_vllm(args, evaluator, variants, folder, description)
        else:
            accuracies, records = evaluate_all(evaluator, variants, show_progress=first and not args.disable_tqdm)
        peak, cut = max(gathered([peak_memory_mb()])), cut_summary(task.prompts)
        if not first:
            return 0
        if line := cut_line(cut):
            print(line)
        summary = {
            **accuracy_fields(accuracies),
            "cut_by_length": cut_by_length(records),
            **({"carried": said} if (said := carried(records)) else {}),
            "eval_items": len(task.eval),
            "left_out": left_out,
            **({"cut": cut} if cut else {}),
            "seconds": round(time.perf_counter() - started, 1),
            "peak_memory_mb": round(peak),
            "evaluation": asdict(decoding),
            "machine": machine(),
            **({"engine": args.engine} if args.engine != OWN else {}),
            **description,
        }
        write_records(folder, records)
        write_summary(folder, summary)
        report = write_report(folder)
        print_accuracies(summary)
        print(f"report: {report}")
    return 0


def _on_vllm(
    args: EvalArguments, evaluator: Evaluator, variants: Sequence[str], folder: Path, description: dict[str, Any]
) -> tuple[dict[str, float], list[Record]]:
    """Like :func:`evaluate_all`; killed and started again, it goes on with what has not been decoded yet."""
    options = engine_options(args.engine_args)
    decided_by = [
        description,
        asdict(evaluator.decoding),
        fingerprint(evaluator.task.eval),
        _weights(args.run),
        options,
    ]
    unfinished = UnfinishedRecords(folder, decided_by)
    with unfinished.opened() as file, deferred(args.trace_dir or folder, options, args.max_trace_gb) as waiting:
        records = evaluate_deferred(evaluator, variants, waiting, file, show_progress=not args.disable_tqdm)
    unfinished.remove()
    return records


def _weights(run: str) -> str:
    """A digest of all that a run has trained."""
    digest = hashlib.sha256()
    for path in sorted(Path(run).rglob("*.safetensors")):
        if not path.relative_to(run).parts[0].startswith("checkpoint"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _asked(args: EvalArguments) -> Sequence[str]:
    texts = args.max_message_tokens is not None
    if args.variants is None:
        return [*VARIANTS, *(TEXT if texts else ())]
    asked = [v.strip() for v in args.variants.split(",")]
    if unknown := [v for v in asked if v not in LABELS]:
        raise ValueError(f"variants has {unknown}; allowed: {', '.join(LABELS)}")
    if texts and not any(v in TEXT for v in asked):
        raise ValueError(
            f"max_message_tokens is {args.max_message_tokens} with variants {args.variants!r}, of which none talks in "
            f"text; allowed: with {', '.join(TEXT)} among them"
        )
    return asked


def _task_arguments(args: EvalArguments, run: Run) -> TaskArguments:
    """The run's own, but for what is given."""
    if run.task.task == IN_PYTHON and args.task is None:
        raise ValueError(
            f"run {args.run} was made in Python and keeps no task; allowed: --task, what to evaluate it on"
        )
    both_files = args.task is None or (args.task.endswith(JSONL) and run.task.task.endswith(JSONL))
    if not both_files and run.task.task != IN_PYTHON:
        raise ValueError(f"task is {args.task!r}; allowed: another .jsonl file, of a run on one")
    given = {k: v for k in ("task", "eval_size", "eval_file", "data_dir") if (v := getattr(args, k)) is not None}
    return replace(run.task, **given)


def load_held_out(args: TaskArguments, trained_eval_size: int | None) -> Task:
    """The task, with no item to evaluate on that a run holding out `trained_eval_size` items was trained on."""
    if args.eval_size is None or not args.splits_one_file:
        return load_task(args)
    task = load_task(replace(args, eval_size=trained_eval_size))
    if not 1 <= args.eval_size <= len(task.eval):
        raise ValueError(f"eval_size is {args.eval_size}; allowed: 1 to {len(task.eval)}, the items not trained on")
    return replace(task, eval=task.eval[: args.eval_size])
