"""`report.html` of a comparison: accuracy and cost by method and task, differences, controls, stability."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from diffmas.evaluation.methods import METHODS, MODES
from diffmas.runs.files import REPORT_FILE
from diffmas.support.atomic import write_atomically
from diffmas.support.page import heading, name, note, page, panels, svg, table

Summary = dict[str, Any]
Cells = dict[tuple[str, str, str], dict[str, Any]]
CONTROLS = ("matched", "mismatched", "zero", "noise")
COLORS = ("#1f6feb", "#bf8700", "#1a7f37", "#cf222e", "#8250df", "#57606a", "#0598bc", "#bf3989", "#953800")


def write_comparison_report(folder: str | Path, summary: Summary) -> Path:
    """Write the report beside the summary; one file, no network needed. Returns its path."""
    cells = by_name(summary)
    tasks, methods = names(summary)
    body = [
        heading(f"{', '.join(tasks)}: {len(methods)} methods", 1),
        heading("Accuracy"),
        _accuracy_table(cells, tasks, methods),
        note(
            "Percent of right answers, averaged over an item's samples and seeds, with 95 % bootstrap intervals over "
            "items and the spread of the seeds. Same prompts, decoding and items for every method; trained methods "
            "share steps and learning rate."
        ),
        svg(draw_accuracies, (cells, tasks, methods)),
        heading("Cost per item"),
        _cost_table(cells, tasks, methods),
        note(
            "Generated: tokens of the answers and of texts between agents. An item's samples share prompts, "
            "latent steps and texts. Time is the batch's wall-clock time divided by its items."
        ),
        heading("Paired differences"),
        _difference_table(summary, lambda d: d["a_control"] == d["b_control"]),
        note(
            "Percentage points, item by item on the same items and seeds; bold where the 95 % interval "
            "excludes zero. Intervals are not corrected for their number."
        ),
    ]
    if any(cell["control"] != "matched" for cell in summary["cells"]):
        body += [
            heading("What the trace carries"),
            _control_table(cells, tasks, methods),
            _difference_table(summary, lambda d: d["a_control"] != d["b_control"]),
            note(
                "Percent of right answers, and percentage points between them, by what the last agent attends to: the "
                "row's own trace (matched), another row's (mismatched), keys and values of zero, and "
                "noise of the same norms, drawn anew for every seed. What is right without the row's own trace was not "
                "communicated. Greedy answers of a method without training are the same for every seed and taken once."
            ),
        ]
    body += [heading("Stability of decoding"), _stability_table(cells, tasks, methods)]
    for task in tasks:
        body.append(svg(draw_stability, (cells, task, methods)))
    body += [heading("Run"), table([], [[k, str(v)] for k, v in summary["machine"].items()], text=2)]
    path = Path(folder, REPORT_FILE)
    write_atomically(path, page(f"DiffMAS: {', '.join(tasks)}", body))
    return path


def print_comparison(summary: Summary) -> None:
    """Accuracies by method and task as a table on the terminal."""
    cells = by_name(summary)
    tasks, methods = names(summary)
    shown = Table("method", *tasks, title="accuracy, % [95 % interval]")
    for method in methods:
        shown.add_row(method, *(accuracy(cells.get((task, method, "matched"))) for task in tasks))
    Console(markup=False).print(shown)


def markdown_table(summary: Summary) -> str:
    """Accuracies, and what the trace carries, as a Markdown table: a row a method, a column a task."""
    cells = by_name(summary)
    tasks, methods = names(summary)
    lines = ["| accuracy, % | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for method in methods:
        values = (accuracy(cells.get((task, method, "matched"))) for task in tasks)
        lines.append(f"| {label(method)} (`{method}`) | " + " | ".join(values) + " |")
    return "\n".join(lines)


def by_name(summary: Summary) -> Cells:
    return {(c["task"], c["method"], c["control"]): c for c in summary["cells"]}


def names(summary: Summary) -> tuple[list[str], list[str]]:
    """Tasks and methods, in the summary's order."""
    cells = summary["cells"]
    return list(dict.fromkeys(c["task"] for c in cells)), list(dict.fromkeys(c["method"] for c in cells))


def label(method: str) -> str:
    known = (METHODS | MODES).get(method)
    return method if known is None else known.label


def accuracy(cell: dict[str, Any] | None) -> str:
    """`92.1 [89.0, 94.5]`, in percent; behind it how many of the answers were cut by length, where some were."""
    if cell is None or cell["accuracy"] is None:
        return "–"
    a = cell["accuracy"]
    cut = f", {100 * cell['cut']:.1f} cut" if cell.get("cut") else ""
    return f"{100 * a['mean']:.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}]{cut}"


def _accuracy_table(cells: Cells, tasks, methods) -> str:
    rows = []
    for method in methods:
        found = [cells.get((task, method, "matched")) for task in tasks]
        seeds = "/".join(dict.fromkeys(str(len(c["seeds"])) for c in found if c))
        rows.append([Markup("{} <code>{}</code>").format(label(method), method), *map(accuracy, found), seeds])
    return table(["method", *map(name, tasks), "seeds"], rows)


def _cost_table(cells: Cells, tasks, methods) -> str:
    rows = []
    for task in tasks:
        for method in methods:
            if (cell := cells.get((task, method, "matched"))) is not None:
                generated = cell["answer_tokens"] + cell["message_tokens"]
                numbers = (generated, cell["message_tokens"], cell["latent_steps"], cell["prefill_tokens"])
                rows.append([name(task), method, *(f"{n:.1f}" for n in numbers), f"{1000 * cell['seconds']:.1f}"])
    head = ["task", "method", "generated tokens", "of them texts", "latent steps", "prompt tokens", "time, ms"]
    return table(head, rows, text=2)


def _difference_table(summary: Summary, wanted) -> str:
    rows = []
    for d in filter(wanted, summary["differences"]):
        value = "{} [{}, {}]".format(*(_points(d[part]) for part in ("mean", "low", "high")))
        if d["low"] > 0 or d["high"] < 0:
            value = Markup("<b>{}</b>").format(value)
        same = d["a_control"] == d["b_control"]
        what = f"{d['a']} − {d['b']}" if same else f"{d['a']}: {d['a_control']} − {d['b_control']}"
        rows.append([name(d["task"]), what, value, str(d["items"])])
    return table(["task", "difference", "points", "items"], rows, text=2)


def _points(share: float) -> str:
    # No "-0.0".
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def _control_table(cells: Cells, tasks, methods) -> str:
    rows = []
    for task in tasks:
        for method in methods:
            found = [cells.get((task, method, control)) for control in CONTROLS]
            if any(found[1:]):
                rows.append([name(task), method, *map(accuracy, found)])
    return table(["task", "method", *CONTROLS], rows, text=2)


def _stability_table(cells: Cells, tasks, methods) -> str:
    rows = []
    for task in tasks:
        for method in methods:
            if (cell := cells.get((task, method, "matched"))) is not None:
                entropy, agreeing = cell["entropy"]["mean"], cell["agreement"]["mean"]
                rows.append(
                    [
                        name(task),
                        method,
                        f"{entropy[0]:.3f}" if entropy else "–",
                        _number(cell["perplexity"]["tokens"], 3),
                        "–" if agreeing is None else f"{agreeing:.2f} of {cell['samples']}",
                    ]
                )
    return table(["task", "method", "entropy of the first token, nats", "perplexity", "agreeing"], rows, text=2)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _wrapped(task: str, width: int = 30) -> str:
    return "\n".join(textwrap.wrap(task, width))


def draw_accuracies(plt, data):
    """Accuracy with its interval, a panel a task; controls as hollow marks on the same line."""
    cells, tasks, methods = data
    figure, shown = panels(plt, len(tasks), 2.9, 0.9 + 0.34 * len(methods))
    marks = {"mismatched": ("x", "another row's trace"), "zero": ("|", "zero trace"), "noise": ("+", "noise")}
    for axes, task in zip(shown, tasks, strict=True):
        for place, method in enumerate(methods):
            cell = cells.get((task, method, "matched"))
            if cell is not None and (a := cell["accuracy"]):
                error = [[100 * (a["mean"] - a["low"])], [100 * (a["high"] - a["mean"])]]
                axes.errorbar(100 * a["mean"], place, xerr=error, fmt="o", color=COLORS[0], ms=5, capsize=2.5, lw=1.4)
            for control, (mark, _) in marks.items():
                other = cells.get((task, method, control))
                if other is not None and other["accuracy"]:
                    axes.plot(100 * other["accuracy"]["mean"], place, mark, color="#6e7781", ms=6)
        axes.set(xlim=(-3, 103), xlabel="accuracy, %")
        axes.set_title(_wrapped(task), fontsize=10)
        axes.set_yticks(range(len(methods)), methods)
        axes.grid(axis="x", color="#eaeef2")
        axes.set_axisbelow(True)
    shown[0].invert_yaxis()
    drawn = [c for c in marks if any((t, m, c) in cells for t in tasks for m in methods)]
    handles = [plt.Line2D([], [], marker="o", ls="", color=COLORS[0], label="its own trace or text")]
    handles += [plt.Line2D([], [], marker=marks[c][0], ls="", color="#6e7781", label=marks[c][1]) for c in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def draw_stability(plt, data):
    """Entropy along the answer, and how many of an item's samples agree, a line a method."""
    cells, task, methods = data
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.3), layout="constrained")
    for place, method in enumerate(methods):
        cell = cells.get((task, method, "matched"))
        if cell is None:
            continue
        color, style = COLORS[place % len(COLORS)], ("-", "--")[place // len(COLORS) % 2]
        curve, counts = cell["entropy"], cell["agreement"]["counts"]
        left.plot(curve["position"], curve["mean"], style, marker="o", ms=3, color=color, label=method)
        if sum(counts):
            shares = [100 * c / sum(counts) for c in counts]
            right.plot(range(len(counts)), shares, style, marker="o", ms=3, color=color)
    left.set(xlabel="position in the answer, tokens", ylabel="token entropy, nats")
    # Nothing is drawn of answers whose engine tells no entropies.
    highest = max((y for line in left.lines for y in line.get_ydata()), default=0)
    left.set_ylim(0, 1.1 * highest or 1)
    figure.suptitle(_wrapped(task, 80), fontsize=11)
    right.set(xlabel="agreeing samples", ylabel="items, %", ylim=(0, 103))
    right.xaxis.get_major_locator().set_params(integer=True)
    left.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure
