"""`python -m benchmarks.curves`: the training step against transformers, and how its time and memory grow.

Measures the step of `cases.FULL_STEP`, what a single-token call of a layer costs beside its arithmetic, and the step
along one size at a time: latent steps, prompt length, agents, batch. Leaves `results.json`, `report.md` and
`curves.png` under `benchmarks/results/step/` and puts the table into README.md. Cut off, the same command goes on.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import cases, ceilings, report, step, unfinished
from benchmarks.cases import Step
from benchmarks.experiment import measure
from benchmarks.memory import line, power_law
from benchmarks.timing import Clock
from diffmas.support.atomic import write_atomically
from diffmas.support.machine import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step"
BEGIN, END = "<!-- step: begin -->", "<!-- step: end -->"
NAMES = {"latent": "latent steps m", "prompt": "tokens of a prompt", "agents": "agents", "batch": "rows"}
SHOWN = (step.OURS, step.CHECKPOINTED, step.PEER)

#: Where the benchmark suite keeps its curves until the end.
STASH = pytest.StashKey[dict[str, list["Result"]]]()

Result = dict[str, Any]


def memory(contender: dict[str, Any]) -> float:
    """Bytes that live until the backward; the trace of ours lies beside what autograd keeps."""
    return contender["saved_bytes"] + contender["trace_bytes"]


def growth(
    axis: str, results: Sequence[Result], name: str, cost: Callable[[dict[str, Any]], float]
) -> dict[str, float]:
    """How a contender's cost grows along `axis` beyond its first value.

    `exponent` of `added cost = c · added size ** exponent`, and `r2` of a straight line through all values.
    """
    points = [
        (r["case"][axis], cost(c)) for r in results for c in r["contenders"] if c["name"] == name and "median_s" in c
    ]
    sizes, costs = zip(*points, strict=True)
    added = [(x - sizes[0], y - costs[0]) for x, y in points[1:] if y > costs[0]]
    exponent = power_law(*zip(*added, strict=True))[0] if len(added) > 1 else float("nan")
    return {"exponent": exponent, "r2": line(sizes, costs)[2]}


def print_curves(curves: dict[str, list[Result]], console: Console | None = None) -> None:
    """Time, tokens a second, memory and error along every axis, and the exponents under them."""
    console = console or Console(width=150)
    for axis, results in curves.items():
        table = Table(title=f"training step by {NAMES[axis]}", title_justify="left")
        for column in (NAMES[axis], *(f"{n}: time, tokens/s, kept" for n in SHOWN), "faster", "kept less", "error"):
            table.add_column(column, justify="right")
        for result in results:
            table.add_row(str(result["case"][axis]), *_cells(result))
        fits = []
        for name in SHOWN:
            time, kept = (growth(axis, results, name, cost) for cost in (lambda c: c["median_s"], memory))
            fits.append(f"time ^{time['exponent']:.2f} (R² {time['r2']:.3f}), kept ^{kept['exponent']:.2f}")
        table.add_section()
        table.add_row("growth", *fits)
        console.print(table)


def _cells(result: Result) -> list[str]:
    by_name = {c["name"]: c for c in result["contenders"]}
    tokens = Step(**result["case"]).tokens
    cells = []
    for name in SHOWN:
        c = by_name[name]
        seconds = c.get("median_s")
        cells.append(
            f"{1e3 * seconds:.0f} ms, {tokens / seconds:.0f}, {memory(c) / 1e6:.1f} MB" if seconds else c["unavailable"]
        )
    ours, peer = by_name[step.OURS], by_name[step.PEER]
    if "median_s" not in peer:
        return [*cells, "", "", ""]
    return [
        *cells, f"{peer['median_s'] / ours['median_s']:.2f} ×", f"{memory(peer) / memory(ours):.1f} ×",
        f"{max(ours['errors'].values()):.0e}",
    ]  # fmt: skip


def measure_all(
    device: str,
    path: Path,
    *,
    seconds: float,
    axes: Sequence[str] | None = None,
    small: bool = False,
    fresh: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """The record of all measurements along `axes` (default: all), at `path` after every one of them.

    Goes on from an unfinished record there, unless `fresh`. `small` takes the least sizes, for a test.

    Raises:
        ValueError: the unfinished record is of another run.
    """
    axes = {axis: cases.STEP_AXES[axis][: 3 if small else None] for axis in axes or cases.STEP_AXES}
    base = replace(cases.STEP_BASE, layers=1, hidden=32, prompt=8, latent=2) if small else cases.STEP_BASE
    plan = [] if small else [("full", cases.FULL_STEP)]
    plan.append(("overhead", replace(cases.OVERHEAD_STEP, latent=4) if small else cases.OVERHEAD_STEP))
    plan += [(axis, replace(base, **{axis: value})) for axis, values in axes.items() for value in values]
    origin = unfinished.origin(device=device, seconds=seconds, cases=[(name, asdict(case)) for name, case in plan])
    data = None if fresh else unfinished.kept(path, origin)
    if data is None:
        rates = ceilings.measure(device, ["float32"])
        data = {unfinished.KEY: origin, "machine": machine(), "ceilings": rates, "curves": {axis: [] for axis in axes}}
    done = sum(name in data for name, _ in plan) + sum(map(len, data["curves"].values()))
    clock = Clock(device)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(plan), completed=done)
        for name, case in plan[done:]:
            progress.update(task, description=f"{name}: {case.label}", refresh=True)
            aim = seconds if name in axes else 4 * seconds
            result = measure(step.build(case, device), seconds=aim, clock=clock)
            if name in axes:
                data["curves"][name].append(result)
            else:
                data[name] = result
            unfinished.save(path, data)
            progress.advance(task)
    del data[unfinished.KEY]
    return data


def markdown(data: dict[str, Any]) -> str:
    """The README's table."""
    full = {c["name"]: c for c in data["full"]["contenders"]}
    peer, case = full[step.PEER], Step(**data["full"]["case"])
    lines = [
        "| one training step | time | tokens/s | faster | kept for the backward | less | relative error |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in SHOWN:
        c = full[name]
        lines.append(
            f"| {name} | {c['median_s']:.2f} s | {case.tokens / c['median_s']:.0f} "
            f"| {peer['median_s'] / c['median_s']:.2f} × | {memory(c) / 1e6:.0f} MB "
            f"| {memory(peer) / memory(c):.1f} × | {max(c['errors'].values()):.0e} |"
        )
    overhead = {c["name"]: c for c in data["overhead"]["contenders"]}
    calls = Step(**data["overhead"]["case"]).layer_calls
    each = {name: 1e6 * overhead[name]["median_s"] / calls for name in (step.OURS, step.PEER)}
    at = data["machine"]
    floor = report.Floor.of(data["full"], data["ceilings"]).seconds / full[step.OURS]["median_s"]
    ratio = each[step.PEER] / each[step.OURS]
    lines += [
        "",
        f"{case.agents} agents, prompts of {case.prompt} tokens, m = {case.latent}, Qwen3-shaped model of "
        f"{case.layers} layers and hidden size {case.hidden} with LoRA, float32. The trace is among what ours "
        f"keeps. Ours is at {100 * floor:.0f} % of the measured matmul and copy rates.",
        f"A layer's call on a single token, of a model too small to compute, costs {each[step.OURS]:.0f} µs forward "
        f"and backward, {ratio:.1f} × less than transformers' {each[step.PEER]:.0f} µs.",
        f"{at['device']}, {at['threads']} threads, torch {at['torch']}, transformers {at['transformers']}. Made by "
        "`python -m benchmarks.curves`.",
    ]
    return "\n".join(lines)


def plot(curves: dict[str, list[Result]], path: Path) -> None:
    """Time and kept memory along every axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure, grid = plt.subplots(2, len(curves), figsize=(3 * len(curves), 5.2), layout="constrained", squeeze=False)
    colors = dict(zip(SHOWN, ("#1f6feb", "#54aeff", "#bf8700"), strict=True))
    costs = {"seconds": lambda c: c["median_s"], "kept for the backward, MB": lambda c: memory(c) / 1e6}
    for column, (axis, results) in enumerate(curves.items()):
        for row, (label, cost) in enumerate(costs.items()):
            axes = grid[row][column]
            for name in SHOWN:
                points = [
                    (r["case"][axis], cost(c))
                    for r in results
                    for c in r["contenders"]
                    if c["name"] == name and "median_s" in c
                ]
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=colors[name], label=name)
            axes.set(xlabel=NAMES[axis], ylabel=label if column == 0 else "", ylim=(0, None))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(SHOWN), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(data: dict[str, Any], folder: Path) -> None:
    """Results, plot and a report with the curves' tables."""
    unfinished.save(folder / report.RESULTS_FILE, data)
    plot(data["curves"], folder / "curves.png")
    console = Console(width=150, file=io.StringIO())
    print_curves(data["curves"], console)
    table = markdown(data) + "\n\n" if "full" in data else ""
    (folder / "report.md").write_text(
        f"{table}![Growth of time and memory](curves.png)\n\n```\n{console.file.getvalue()}```\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--render-only", action="store_true", help="only draw and rewrite README from the kept results")
    parser.add_argument("--seconds", type=float, default=1.0, help="what timing a case aims at")
    parser.add_argument("--axes", nargs="+", choices=list(cases.STEP_AXES), help="sizes to vary; default: all")
    parser.add_argument("--fresh", action="store_true", help="measure everything; drop what a run cut off has left")
    args = parser.parse_args()
    path = RESULTS / report.RESULTS_FILE
    try:
        if args.render_only:
            data = json.loads(path.read_text())
            if unfinished.KEY in data:
                raise ValueError(f"{path.name} is unfinished; allowed: going on with it, without --render-only")
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            data = measure_all(device, path, seconds=args.seconds, axes=args.axes, fresh=args.fresh)
    except ValueError as error:
        parser.error(str(error))
    write(data, RESULTS)
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(BEGIN)
    write_atomically(ROOT / "README.md", f"{before}{BEGIN}\n{markdown(data)}\n{END}{rest.split(END)[1]}")
    print_curves(data["curves"])
    print(markdown(data))


if __name__ == "__main__":
    main()
