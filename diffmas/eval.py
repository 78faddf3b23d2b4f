"""`python -m diffmas.eval --run DIR`: accuracy of a trained run under every trace control.

With `--methods`, all of them on all `--tasks` and `--seeds`: what has to be trained is trained first, with the flags of
`diffmas.train` given here; killed and started again, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from diffmas.agents.controls import CONTROLS
from diffmas.agents.topology import Topology
from diffmas.command_line import LESS_MEMORY, Parser, as_flags, integers
from diffmas.comparison.comparison import Comparison, Interrupted, Options, Settings, changes
from diffmas.comparison.report import print_comparison, write_comparison_report
from diffmas.evaluation.evaluator import VARIANTS, Evaluator, evaluate_all
from diffmas.evaluation.methods import METHODS, Method, choose_methods
from diffmas.evaluation.needs import check_prompts, method_left_out, print_left_out, roles_of, variants_left_out
from diffmas.generation import Decoding
from diffmas.loading import load_run
from diffmas.prompts.dates import print_date
from diffmas.prompts.shortened import cut_line, cut_summary
from diffmas.runs.description import anchored, describe, read_description
from diffmas.runs.files import ADAPTER_FILE, SYSTEM_FILE
from diffmas.support.distributed import gathered, process
from diffmas.support.failures import run_program
from diffmas.support.folders import check_output
from diffmas.support.interrupts import raise_on_interrupt
from diffmas.support.lock import locked
from diffmas.support.machine import machine, peak_memory_mb
from diffmas.support.yaml_file import read_yaml
from diffmas.tasks import Task, TaskArguments, load_task
from diffmas.tasks.base import IN_PYTHON, JSONL
from diffmas.tasks.content import fingerprint
from diffmas.training.launch import check_alone, join
from diffmas.training.report import accuracy_fields, print_accuracies, write_records, write_report, write_summary

PROGRAM = "python -m diffmas.eval"
#: Arguments that say something only without, or only with, `--methods`.
WITHOUT_METHODS = ("variants", "seed")
WITH_METHODS = ("tasks", "seeds", "controls", "samples", "max_message_tokens", "task_config")
#: Settings that leave the weights a training gives as they are, up to rounding.
SAME_WEIGHTS = {"backend", "cuda_graphs", "checkpointing", "loss", "data_dir"}


@dataclass
class EvalArguments:
    """What to evaluate; what is left out is as in the run."""

    run: str = field(metadata={"help": "Folder written by diffmas.train; with --methods, one to be made will do."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where results go; default: RUN/eval, with --methods RUN/methods or a new RUN."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "The run's base model, where its folder has moved."},
    )
    task: str | None = field(
        default=None,
        metadata={"help": "The task's .jsonl file, where it has moved; of a run made in Python, its task."},
    )
    variants: str | None = field(
        default=None, metadata={"help": f"Any of {', '.join(VARIANTS)}; default: all that say something about the run."}
    )
    batch_size: int = field(default=64, metadata={"help": "Rows decoded together."})
    seed: int = field(default=0, metadata={"help": "Of sampling and of the noise control."})
    eval_size: int | None = field(default=None, metadata={"help": "Evaluate on the first so many items only."})
    eval_file: str | None = field(
        default=None, metadata={"help": "JSONL file to evaluate on instead, where the task is one."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the task's files."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer."})
    temperature: float | None = field(default=None, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus of sampling."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})
    methods: str | None = field(default=None, metadata={"help": f"all, or any of {', '.join(METHODS)}."})
    tasks: str | None = field(default=None, metadata={"help": "Tasks to compare methods on; default: the run's."})
    seeds: str | None = field(
        default=None,
        metadata={"help": "Seeds of training and sampling to compare methods over; default: the run's own, or 0."},
    )
    controls: str = field(default=",".join(CONTROLS), metadata={"help": f"Any of {', '.join(CONTROLS)}."})
    samples: int = field(default=1, metadata={"help": "Answers an item, when comparing methods."})
    max_message_tokens: int | None = field(
        default=None, metadata={"help": "Longest text between agents; default: max_new_tokens."}
    )
    task_config: str | None = field(
        default=None, metadata={"help": "YAML file {task: {flag: value}} of what differs between tasks."}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print a table, write records, summary and report. Returns the process's exit status."""
    raise_on_interrupt()
    parser = Parser(EvalArguments, prog=PROGRAM, description=__doc__)
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown and args.methods is None:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")

    def work() -> int:
        _check_used(args)
        with contextlib.ExitStack() as held:
            return _evaluate(args, held) if args.methods is None else _compare(args, unknown)

    return run_program(PROGRAM, work, lower=LESS_MEMORY)


def _evaluate(args: EvalArguments, held: contextlib.ExitStack) -> int:
    started = time.perf_counter()
    variants = [v.strip() for v in args.variants.split(",")] if args.variants else list(VARIANTS)
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise ValueError(f"variants has {unknown}; allowed: {', '.join(VARIANTS)}")
    # Under torchrun, this joins the other processes.
    device = join()
    folder = Path(args.output_dir or Path(args.run, "eval"))
    check_output(folder, "output_dir")
    run = load_run(args.run, args.model_name_or_path)
    set_seed(args.seed)
    given = {k: v for k in ("task", "eval_size", "eval_file", "data_dir") if (v := getattr(args, k)) is not None}
    if run.task.task == IN_PYTHON and args.task is None:
        raise ValueError(
            f"run {args.run} was made in Python and keeps no task; allowed: --task, what to evaluate it on"
        )
    both_files = args.task is None or (args.task.endswith(JSONL) and run.task.task.endswith(JSONL))
    if not both_files and run.task.task != IN_PYTHON:
        raise ValueError(f"task is {args.task!r}; allowed: another .jsonl file, of a run on one")
    task_args = replace(run.task, **given)
    given = {k: v for k in ("max_new_tokens", "temperature", "top_p") if (v := getattr(args, k)) is not None}
    decoding = Decoding(**{**run.decoding, **given, "seed": args.seed})
    run.system.to(device)
    in_python = run.task.task == IN_PYTHON
    task = load_task(task_args) if in_python else _load_held_out(task_args, run.task.eval_size)
    task = replace(task, prompts=task.prompts.with_roles(run.system.topology.prompts))
    check_prompts(task, roles_of(run.system.topology), training=False)
    left_out = {v: why for v, why in variants_left_out(task, run.system.topology).items() if v in variants}
    for variant, reason in left_out.items():
        if args.variants:
            raise ValueError(f"variants has {variant!r}: {reason}; allowed: {', '.join(VARIANTS.keys() - left_out)}")
    task.ready()
    if args.eval_size is None and run.data.get("eval", same := fingerprint(task.eval)) != same and process() == 0:
        print(f"the held-out items are not those of {args.run}'s own evaluation")
    evaluator = Evaluator(run.system, run.tokenizer, task, decoding, batch_size=args.batch_size)
    first = process() == 0
    if first:
        print_date(run.tokenizer, task_args.date)
        print_left_out(left_out)
    variants = [variant for variant in variants if variant not in left_out]
    if first:
        held.enter_context(locked(folder))
    accuracies, records = evaluate_all(evaluator, variants, show_progress=first and not args.disable_tqdm)
    peak, cut = max(gathered([peak_memory_mb()])), cut_summary(task.prompts)
    if not first:
        return 0
    if line := cut_line(cut):
        print(line)
    summary = {
        **accuracy_fields(accuracies),
        "eval_items": len(task.eval),
        "left_out": left_out,
        **({"cut": cut} if cut else {}),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mb": round(peak),
        "evaluation": asdict(decoding),
        "machine": machine(),
        **describe(run.system, run.args, task_args, run.decoding),
    }
    write_records(folder, records)
    write_summary(folder, summary)
    report = write_report(folder)
    print_accuracies(summary)
    print(f"report: {report}")
    return 0


def _compare(args: EvalArguments, flags: Sequence[str]) -> int:
    check_alone("--methods")
    run, methods = Path(args.run), choose_methods(args.methods)
    controls = [c.strip() for c in args.controls.split(",")]
    if unknown := [c for c in controls if c not in CONTROLS]:
        raise ValueError(f"controls has {unknown}; allowed: {', '.join(CONTROLS)}")
    description = read_description(run) if (run / SYSTEM_FILE).is_file() else {}
    own_seed = description.get("training", {}).get("seed", 0)
    seeds = [own_seed] if args.seeds is None else integers("seeds", args.seeds)
    parts = [dict(description.get(part, {})) for part in ("system", "task", "decoding", "training")]
    # The files of the run's own task, and how they are read, say nothing about another one's.
    own_task = parts[1].get("task")
    own_files = {name: parts[1].pop(name, None) for name in ("data_dir", "eval_file", "fields", "checker")}
    shared = (
        "model_name_or_path",
        "task",
        "eval_size",
        "eval_file",
        "data_dir",
        "max_new_tokens",
        "temperature",
        "top_p",
    )
    common = [f for part in parts for f in as_flags(part) if not f.startswith("--seed=")]
    common += [*as_flags({name: getattr(args, name) for name in shared}), *flags]
    per_task = _read_task_config(args.task_config)
    tasks = [t.strip() for t in args.tasks.split(",")] if args.tasks else [Settings(common, PROGRAM).task.task]
    if unused := [name for name in per_task if name not in tasks]:
        raise ValueError(f"task_config has {unused}; allowed: the tasks {', '.join(tasks)}")
    by_task = {
        name: [
            *as_flags(own_files if name == own_task else {}), *common, f"--task={name}",
            *as_flags(per_task.get(name, {})),
        ]
        for name in tasks
    }  # fmt: skip
    detached = description.get("system", {}).get("detach_trace", False)
    if any(Settings(f, PROGRAM).system.detach_trace != detached for f in by_task.values()):
        raise ValueError("detach_trace is given with methods, which have it set; allowed: diffmas or diffmas+detach")
    folder = Path(args.output_dir or (run / "methods" if description else run))
    check_output(folder, "output_dir" if args.output_dir else "run")
    adapters = {}
    own = next((n for n in by_task if description and _same_task(n, description["task"]["task"])), None)
    if (run / ADAPTER_FILE).is_file() and (name := own) is not None:
        trained = _method_of(description)
        if other := _trained_otherwise(Settings(by_task[name], PROGRAM), METHODS[trained], description):
            print(f"{run} was trained with {other}: its adapter is not taken for {trained}")
        else:
            adapters[name, trained, own_seed] = run
    if args.methods == "all":
        methods = _applicable(methods, [Settings(f, PROGRAM) for f in by_task.values()])
    comparison = Comparison(
        folder, by_task, methods, seeds, controls,
        Options(args.samples, args.batch_size, args.max_message_tokens),
        adapters=adapters, prog=PROGRAM, show_progress=not args.disable_tqdm,
    )  # fmt: skip
    try:
        summary = comparison.run()
    except (Interrupted, KeyboardInterrupt):
        print(f"stopped; the same command goes on where {folder} ends")
        return 130
    print_comparison(summary)
    print(f"report: {write_comparison_report(folder, summary)}")
    return 0


def _same_task(a: str, b: str) -> bool:
    return anchored(TaskArguments(task=a)).task == anchored(TaskArguments(task=b)).task


def _applicable(methods: Sequence[Method], settings: Sequence[Settings]) -> list[Method]:
    """Those methods that apply to every task; the others are named."""
    tasks = [(s.load_task(), s.topology) for s in settings]
    kept = []
    for method in methods:
        reasons = (method_left_out(method, task, topology) for task, topology in tasks)
        if (reason := next(filter(None, reasons), None)) is None:
            kept.append(method)
        else:
            print(f"method {method.name} is left out: {reason}", flush=True)
    return kept


def _method_of(description: dict[str, Any]) -> str:
    """The method a run of `diffmas.train` is."""
    topology = Topology.from_dict(description["topology"])
    if len(topology.agents) == 1:
        return "single+sft"
    # Of two agents, one trace is all traces put together.
    if len(topology.agents) > 2 and METHODS["stitch+train"].topology(topology).agents == topology.agents:
        return "stitch+train"
    return "diffmas+detach" if description["system"]["detach_trace"] else "diffmas"


def _trained_otherwise(settings: Settings, method: Method, description: dict[str, Any]) -> str | None:
    """What a run's training had set differently from `settings`; None where it gives the same weights."""
    now = settings.describe()
    now["task"] = asdict(anchored(settings.task))
    now["system"] |= method.settings
    now["topology"] = method.topology(settings.topology).to_dict()
    same = SAME_WEIGHTS if settings.task.splits_one_file else SAME_WEIGHTS | {"eval_size", "eval_file"}
    for part in ("system", "topology", "task", "training"):
        for key, _, was in changes(json.loads(json.dumps(now[part])), description.get(part, {})):
            if key not in same and key != "seed":
                return f"{key} {was!r}"
    return None


def _load_held_out(args: TaskArguments, trained_eval_size: int | None) -> Task:
    """The task, with no item to evaluate on that a run holding out `trained_eval_size` items was trained on."""
    if args.eval_size is None or not args.splits_one_file:
        return load_task(args)
    task = load_task(replace(args, eval_size=trained_eval_size))
    if not 1 <= args.eval_size <= len(task.eval):
        raise ValueError(f"eval_size is {args.eval_size}; allowed: 1 to {len(task.eval)}, the items not trained on")
    return replace(task, eval=task.eval[: args.eval_size])


def _check_used(args: EvalArguments) -> None:
    """Raise `ValueError` for an argument that would be ignored."""
    names, how = (WITH_METHODS, "with") if args.methods is None else (WITHOUT_METHODS, "without")
    for f in fields(args):
        if f.name in names and (value := getattr(args, f.name)) != f.default:
            raise ValueError(f"{f.name} is {value!r}; allowed: only {how} --methods")


def _read_task_config(path: str | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    values = read_yaml(path, "task_config")
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise ValueError(f"task_config {path} is {values!r}; allowed: {{task: {{flag: value}}}}")
    return values


if __name__ == "__main__":
    sys.exit(main())
