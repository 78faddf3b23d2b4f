"""`report.html` of an ablation: a table, and a plot an axis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diffmas.comparison.axes import AXES
from diffmas.comparison.report import accuracy, by_name
from diffmas.runs.files import REPORT_FILE
from diffmas.support.atomic import write_atomically
from diffmas.support.page import heading, listing, note, page, panels, svg, table

COLUMNS = ("", "accuracy, %", "another row's trace, %")
#: Values by axis.
Swept = dict[str, list[Any]]


def sweep_rows(summary: dict[str, Any], task: str, swept: Swept) -> list[list[str]]:
    """Label, accuracy and accuracy with another row's trace of every value."""
    cells = by_name(summary)
    return [
        [f"{axis} {value}", *(accuracy(cells.get((task, f"{axis}={value}", c))) for c in ("matched", "mismatched"))]
        for axis, values in swept.items()
        for value in values
    ]


def print_ablation(summary: dict[str, Any], task: str, swept: Swept) -> None:
    """The same rows as a table on the terminal."""
    shown = Table(*COLUMNS, title=task)
    for row in sweep_rows(summary, task, swept):
        shown.add_row(*row)
    Console(markup=False).print(shown)


def write_ablation_report(folder: str | Path, summary: dict[str, Any], task: str, swept: Swept) -> Path:
    """A table and a plot an axis in `report.html`. Returns its path."""
    body = [
        heading(f"{task}: one thing at a time", 1),
        svg(draw_sweeps, (by_name(summary), task, swept)),
        table(COLUMNS, sweep_rows(summary, task, swept)),
        note(
            "Trained and evaluated at every value, all else equal; in brackets 95 % bootstrap intervals over items and "
            "the spread of the seeds."
        ),
        heading("Settings"),
        listing(json.dumps(summary["settings"], indent=1)),
    ]
    path = Path(folder, REPORT_FILE)
    write_atomically(path, page(f"DiffMAS: ablation on {task}", body))
    return path


def draw_sweeps(plt, data):
    """Accuracy with its interval against the swept value, a panel an axis; grey: another row's trace."""
    cells, task, swept = data
    figure, shown = panels(plt, len(swept), 2.9, 3.2)
    for axes, (axis, values) in zip(shown, swept.items(), strict=True):
        # Between numbers there is something, between names nothing.
        line = "-" if AXES[axis] is int else ""
        for control, style, color, aside in (
            ("matched", f"o{line}", "#1f6feb", -0.06), ("mismatched", f"o{line * 2}", "#8c959f", 0.06),
        ):  # fmt: skip
            found = [(i, cells.get((task, f"{axis}={v}", control))) for i, v in enumerate(values)]
            found = [(i, cell["accuracy"]) for i, cell in found if cell is not None and cell["accuracy"]]
            if found:
                means = [100 * a["mean"] for _, a in found]
                low, high = ([100 * abs(a["mean"] - a[end]) for _, a in found] for end in ("low", "high"))
                label = "the row's own trace" if control == "matched" else "another row's"
                places = [i + aside for i, _ in found]
                axes.errorbar(places, means, [low, high], fmt=style, color=color, capsize=3, ms=5, label=label)
        axes.set_xticks(range(len(values)), [str(v) for v in values])
        axes.set(xlabel=axis.replace("_", " "), xlim=(-0.5, len(values) - 0.5), ylim=(-3, 103))
    for axes in shown[::3]:
        axes.set(ylabel="accuracy, %")
    handles, labels = shown[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
