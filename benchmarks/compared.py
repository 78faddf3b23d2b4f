"""What the comparisons of methods share: run, go on after a kill, put table and plot where they are read."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.relay import ROOT
from diffmas.comparison.comparison import Comparison, Options
from diffmas.comparison.report import (
    by_name,
    draw_accuracies,
    markdown_table,
    names,
    print_comparison,
    write_comparison_report,
)
from diffmas.evaluation.methods import choose_methods
from diffmas.support.atomic import write_atomically
from diffmas.support.machine import machine

PAGE = ROOT / "docs" / "methods.md"


@dataclass(frozen=True)
class Study:
    """One comparison.

    Args:
        name: of its folder under `benchmarks/results/`, and of the marks between which the page holds its table.
        tasks: those there are, by name.
        seeds, items, controls: defaults; how many seeds, and held-out items a task.
        said: what stands before the table and behind it, of a summary.
    """

    name: str
    tasks: tuple[str, ...]
    seeds: int
    items: int
    controls: tuple[str, ...]
    options: Options
    said: Callable[[dict[str, Any]], tuple[str, str]]

    @property
    def results(self) -> Path:
        return ROOT / "benchmarks" / "results" / self.name


def parser_of(study: Study, doc: str) -> argparse.ArgumentParser:
    """Flags of every study."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{study.name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = f"runs/{study.name}"
    parser.add_argument("--folder", default=folder, help="where adapters and answers are kept between calls")
    parser.add_argument("--seeds", type=int, default=study.seeds, help="how many")
    parser.add_argument("--items", type=int, default=study.items, help="held-out items a task")
    parser.add_argument("--steps", type=float, default=1.0, help="scale of all training steps, for a quick try")
    parser.add_argument("--methods", default="all", help="as for python -m diffmas.eval")
    parser.add_argument("--tasks", default=",".join(study.tasks), help="any of the default's")
    parser.add_argument("--no-results", action="store_true", help="leave committed results and the page as they are")
    parser.add_argument("--remark", help="what else there is to know of this measurement; stands below the table")
    parser.add_argument("--render-only", action="store_true", help="only draw and rewrite the page from kept results")
    return parser


def run(
    study: Study,
    parser: argparse.ArgumentParser,
    flags_of: Callable[[argparse.Namespace, Path], dict[str, list[str]]],
    argv: list[str] | None = None,
) -> None:
    """The study from its flags to its page; `flags_of` makes what its folder needs and says each task's flags."""
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    if args.render_only:
        summary = json.loads((study.results / "summary.json").read_text())
        if args.remark is not None:
            summary["remark"] = args.remark
            write_atomically(study.results / "summary.json", json.dumps(portable(summary), indent=1) + "\n")
        return render(study, summary)
    chosen = args.tasks.split(",")
    if unknown := set(chosen) - set(study.tasks):
        parser.error(f"tasks has {sorted(unknown)}; allowed: {', '.join(study.tasks)}")
    folder, began = Path(args.folder), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    flags = flags_of(args, folder)
    comparison = Comparison(
        folder, {name: flags[name] for name in chosen}, choose_methods(args.methods), range(args.seeds),
        study.controls, options=study.options, show_progress=False, narrate=Console().print,
    )  # fmt: skip
    spent = folder / "seconds.json"
    earlier = json.loads(spent.read_text()) if spent.is_file() else 0.0
    try:
        summary = comparison.run()
    finally:
        seconds = earlier + time.perf_counter() - began
        write_atomically(spent, json.dumps(round(seconds, 1)) + "\n")
    summary = summary | {"minutes": round(seconds / 60, 1), "machine": machine(), "remark": args.remark}
    print_comparison(summary)
    print(f"{summary['minutes']} minutes; report: {write_comparison_report(folder, summary)}")
    if not args.no_results:
        study.results.mkdir(parents=True, exist_ok=True)
        write_atomically(study.results / "summary.json", json.dumps(portable(summary), indent=1) + "\n")
        render(study, summary)


def portable(value: Any) -> Any:
    """A summary in which a folder or file of this machine is called by its name alone."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def render(study: Study, summary: dict[str, Any]) -> None:
    """Plot, table and page from a summary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = draw_accuracies(plt, (by_name(summary), *names(summary)))
        figure.savefig(study.results / f"{study.name}.png", dpi=140)
    text = section(study, summary)
    write_atomically(study.results / f"{study.name}.md", text + "\n")
    begin, end = (f"<!-- {study.name}: {word} -->" for word in ("begin", "end"))
    before, rest = PAGE.read_text().split(begin)
    write_atomically(PAGE, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def section(study: Study, summary: dict[str, Any]) -> str:
    """What the page shows: accuracies, what the traces carry, where it comes from."""
    tasks, methods = names(summary)
    above, below = study.said(summary)
    lines = [above, ""] if above else []
    lines += [markdown_table(summary), "", "| matched − mismatched trace, points | " + " | ".join(tasks) + " |"]
    lines.append("|---|" + "---:|" * len(tasks))
    found = {(d["task"], d["a"]): d for d in summary["differences"] if d["b_control"] == "mismatched"}
    for method in methods:
        row = [found.get((task, method)) for task in tasks]
        if any(row):
            lines.append(f"| `{method}` | " + " | ".join("–" if d is None else points(d) for d in row) + " |")
    said = [below, origin(summary), f"Made by `python -m benchmarks.{study.name}`.", summary.get("remark") or ""]
    return "\n".join([*lines, "", " ".join(filter(None, said))])


def points(difference: dict[str, Any]) -> str:
    """A difference of accuracies with its interval."""
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def sizes(summary: dict[str, Any]) -> str:
    """How many held-out items there were, and seeds."""
    cells = by_name(summary)
    tasks, methods = names(summary)
    counted = ", ".join(f"{cells[task, methods[0], 'matched']['accuracy']['items']} of {task}" for task in tasks)
    return f"Held-out items ({counted}), {max(len(cell['seeds']) for cell in summary['cells'])} seeds"


def origin(summary: dict[str, Any]) -> str:
    """Time, machine and versions."""
    of = summary["machine"]
    return (
        f"{summary['minutes']} minutes; {of['device']}, {of['threads']} threads, torch {of['torch']}, transformers "
        f"{of['transformers']}."
    )
