"""One comparison of methods from its settings to its report: what `python -m diffmas.eval --methods` does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffmas.agents.controls import CONTROLS
from diffmas.command_line import as_flags, integers
from diffmas.comparison.comparison import Comparison, Options, Settings, run_to_end
from diffmas.comparison.report import print_comparison, write_comparison_report
from diffmas.comparison.trained import own_adapter
from diffmas.evaluation.deferred import deferred
from diffmas.evaluation.methods import MODES, Method, choose_methods
from diffmas.evaluation.needs import method_left_out, other_modes
from diffmas.evaluation.settings import EvalArguments
from diffmas.runs.description import read_description
from diffmas.runs.files import SYSTEM_FILE
from diffmas.serving.options import VLLM, engine_options
from diffmas.support.folders import check_output
from diffmas.support.launch import check_alone
from diffmas.support.yaml_file import read_yaml

#: What `diffmas.train` and an evaluation both can be told.
_SHARED = (
    "model_name_or_path", "gguf_file", "task", "eval_size", "eval_file", "data_dir", "max_new_tokens", "temperature",
    "top_p",
)  # fmt: skip


def compare(args: EvalArguments, flags: Sequence[str], prog: str) -> int:
    """Train and evaluate what is missing, print a table, write the report. Returns the process's exit status.

    Args:
        flags: those of `diffmas.train`, for every method and task.
        prog: the program that complains of them.

    Raises:
        ValueError: an argument that would be ignored, or does not fit the others.
    """
    args.check_used()
    check_alone("--methods")
    run, methods = Path(args.run), choose_methods(args.methods)
    controls = [c.strip() for c in args.controls.split(",")]
    if unknown := [c for c in controls if c not in CONTROLS]:
        raise ValueError(f"controls has {unknown}; allowed: {', '.join(CONTROLS)}")
    description = read_description(run) if (run / SYSTEM_FILE).is_file() else {}
    own_seed = description.get("training", {}).get("seed", 0)
    seeds = [own_seed] if args.seeds is None else integers("seeds", args.seeds)
    by_task = _flags_by_task(args, flags, description, prog)
    settings = {name: Settings(f, prog) for name, f in by_task.items()}
    detached = description.get("system", {}).get("detach_trace", False)
    if any(s.system.detach_trace != detached for s in settings.values()):
        raise ValueError("detach_trace is given with methods, which have it set; allowed: diffmas or diffmas+detach")
    folder = Path(args.output_dir or (run / "methods" if description else run))
    check_output(folder, "output_dir" if args.output_dir else "run")
    own = own_adapter(run, description, settings)
    if args.methods == "all":
        methods = _applicable(methods, list(settings.values()))
    options, defer = engine_options(args.engine_args), None
    if args.engine == VLLM:
        defer = partial(deferred, args.trace_dir or folder, options, args.max_trace_gb)
    comparison = Comparison(
        folder, by_task, methods, seeds, controls,
        Options(args.samples, args.batch_size, args.max_message_tokens, args.engine),
        adapters={} if own is None else {(*own, own_seed): run}, prog=prog, show_progress=not args.disable_tqdm,
        defer=defer,
    )  # fmt: skip
    if (summary := run_to_end(comparison)) is None:
        return 130
    print_comparison(summary)
    print(f"report: {write_comparison_report(folder, summary)}")
    return 0


def _flags_by_task(
    args: EvalArguments, flags: Sequence[str], description: dict[str, Any], prog: str
) -> dict[str, list[str]]:
    """By task, the flags of `diffmas.train`: a run's own, those given, and what the task's configuration says."""
    parts = [dict(description.get(part, {})) for part in ("system", "task", "decoding", "training")]
    # The files of the run's own task, and how they are read, say nothing about another one's.
    own_task = parts[1].get("task")
    own_files = {name: parts[1].pop(name, None) for name in ("data_dir", "eval_file", "fields", "checker")}
    common = [f for part in parts for f in as_flags(part) if not f.startswith("--seed=")]
    common += [*as_flags({name: getattr(args, name) for name in _SHARED}), *flags]
    per_task = _read_task_config(args.task_config)
    tasks = [t.strip() for t in args.tasks.split(",")] if args.tasks else [Settings(common, prog).task.task]
    if unused := [name for name in per_task if name not in tasks]:
        raise ValueError(f"task_config has {unused}; allowed: the tasks {', '.join(tasks)}")
    return {
        name: [
            *as_flags(own_files if name == own_task else {}), *common, f"--task={name}",
            *as_flags(per_task.get(name, {})),
        ]
        for name in tasks
    }  # fmt: skip


def _applicable(methods: Sequence[Method], settings: Sequence[Settings]) -> list[Method]:
    """Those methods that apply to every task, and one agent in the mode it is not in by itself; others are named."""
    tasks = [(s.load_task(), s.topology) for s in settings]
    kept = []
    for method in methods:
        reasons = (method_left_out(method, task, topology) for task, topology in tasks)
        if (reason := next(filter(None, reasons), None)) is None:
            kept.append(method)
        else:
            print(f"method {method.name} is left out: {reason}", flush=True)
    others = [set(other_modes(task, s.topology, s.tokenizer)) for s, (task, _) in zip(settings, tasks, strict=True)]
    return kept + [MODES[name] for name in MODES if all(name.replace("+", "_") in found for found in others)]


def _read_task_config(path: str | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    values = read_yaml(path, "task_config")
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise ValueError(f"task_config {path} is {values!r}; allowed: {{task: {{flag: value}}}}")
    return values
