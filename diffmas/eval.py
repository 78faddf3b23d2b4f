"""`python -m diffmas.eval --run DIR`: accuracy of a trained run under every trace control."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import set_seed

from diffmas.arguments import Parser
from diffmas.evaluation import VARIANTS, Evaluator, evaluate_all
from diffmas.generation import Decoding
from diffmas.machine import machine, peak_memory_mb
from diffmas.report import accuracy_fields, print_accuracies, write_records, write_report, write_summary
from diffmas.runs import describe, load_run
from diffmas.tasks import load_task


@dataclass
class EvalArguments:
    """What to evaluate; what is left out is as in the run."""

    run: str = field(metadata={"help": "Folder written by diffmas.train."})
    output_dir: str | None = field(default=None, metadata={"help": "Where results go; default: RUN/eval."})
    variants: str = field(default=",".join(VARIANTS), metadata={"help": f"Any of {', '.join(VARIANTS)}."})
    batch_size: int = field(default=64, metadata={"help": "Rows decoded together."})
    seed: int = field(default=0, metadata={"help": "Of sampling and of the noise control."})
    eval_size: int | None = field(default=None, metadata={"help": "Evaluate on the first so many items only."})
    eval_file: str | None = field(default=None, metadata={"help": "JSONL file to evaluate on instead."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the task's files."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer."})
    temperature: float | None = field(default=None, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus of sampling."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print a table, write records, summary and report. Returns the process's exit status."""
    parser = Parser(EvalArguments, prog="python -m diffmas.eval", description=__doc__)
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return _evaluate(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def _evaluate(args: EvalArguments) -> int:
    started = time.perf_counter()
    variants = [v.strip() for v in args.variants.split(",")]
    if unknown := [v for v in variants if v not in VARIANTS]:
        raise ValueError(f"variants has {unknown}; allowed: {', '.join(VARIANTS)}")
    run = load_run(args.run)
    set_seed(args.seed)
    changes = {k: v for k in ("eval_size", "eval_file", "data_dir") if (v := getattr(args, k)) is not None}
    task_args = replace(run.task, **changes)
    changes = {k: v for k in ("max_new_tokens", "temperature", "top_p") if (v := getattr(args, k)) is not None}
    decoding = Decoding(**{**run.decoding, **changes, "seed": args.seed})
    if torch.cuda.is_available():
        run.system.cuda()
    task = load_task(task_args)
    evaluator = Evaluator(run.system, run.tokenizer, task, decoding, batch_size=args.batch_size)
    accuracies, records = evaluate_all(evaluator, variants, show_progress=not args.disable_tqdm)
    folder = Path(args.output_dir or Path(args.run, "eval"))
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder, records)
    summary = {
        **accuracy_fields(accuracies),
        "eval_items": len(task.eval),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mb": round(peak_memory_mb()),
        "evaluation": asdict(decoding),
        "machine": machine(),
        **describe(run.system, run.args, task_args, run.decoding),
    }
    write_summary(folder, summary)
    report = write_report(folder)
    print_accuracies(summary)
    print(f"report: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
