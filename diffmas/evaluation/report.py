"""What a run leaves for people: summary, records, a report with plots, a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diffmas.evaluation.evaluator import LABELS, variant_of
from diffmas.evaluation.records import Record
from diffmas.evaluation.statistics import paired_difference
from diffmas.runs import profile as profiles
from diffmas.runs.files import METRICS_FILE, PROFILE_FILE, RECORDS_FILE, REPORT_FILE, SUMMARY_FILE
from diffmas.runs.metrics import LATENT_NORMS, RESTATING_LOSS, read_metrics
from diffmas.support.atomic import write_atomically
from diffmas.support.failures import writing
from diffmas.support.page import heading, note, page, svg, table
from diffmas.support.valid_json import to_json

#: The variants whose difference is what a trace carries.
_PAIR = ("matched", "mismatched")
_COLUMNS = ("", "accuracy", "cut by length")


def accuracy_fields(accuracies: dict[str, float]) -> dict[str, float]:
    """`accuracy`, `accuracy_mismatched`, … from accuracies by variant."""
    return {_field(variant): value for variant, value in accuracies.items()}


def cut_by_length(records: Sequence[Record]) -> dict[str, float]:
    """By variant, the share of answers that the longest length allowed ended."""
    found: dict[str, list[bool]] = {}
    for record in records:
        found.setdefault(variant_of(record), []).append(record.finish == "length")
    return {variant: sum(cut) / len(cut) for variant, cut in found.items()}


def carried(records: Sequence[Record]) -> dict[str, float] | None:
    """Accuracy with the row's own trace less that with another row's, with its 95 % interval over the items.

    None where they were not both evaluated. It is what the trained trace says of its row, and of no other.
    """
    right = {variant: {r.index: r.correct for r in records if variant_of(r) == variant} for variant in _PAIR}
    own, other = right.values()
    if not own or own.keys() != other.keys():
        return None
    found = paired_difference([own[i] for i in sorted(own)], [other[i] for i in sorted(own)])
    return {"mean": found.mean, "low": found.low, "high": found.high}


def write_summary(folder: str | Path, summary: dict[str, Any]) -> None:
    write_atomically(Path(folder, SUMMARY_FILE), to_json(summary, indent=2) + "\n")


def write_records(folder: str | Path, records: Sequence[Record]) -> None:
    """Per-item JSONL: the fields of a record, and the variant it belongs to."""
    path = Path(folder, RECORDS_FILE)
    with writing(path), path.open("w") as file:
        file.writelines(to_json({"variant": variant_of(r), **asdict(r)}) + "\n" for r in records)


def print_accuracies(summary: dict[str, Any]) -> None:
    """The accuracies of a summary as a table on the terminal."""
    rows, said = _accuracies(summary), _carried(summary)
    if rows:
        table = Table(*_COLUMNS, title=f"{summary['eval_items']} held-out items")
        for row in _cells(rows):
            table.add_row(*row)
        Console().print(table)
    if said:
        Console().print(said, highlight=False)


def write_report(folder: str | Path) -> Path:
    """`report.html` from the folder's summary and metrics: one file, no network needed. Returns its path."""
    folder = Path(folder)
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    metrics = read_metrics(folder / METRICS_FILE)
    topology = summary["topology"]
    about = {
        "agents": " → ".join(a["name"] for a in topology["agents"]) + f" ({topology['name']}, {topology['handover']})",
        "latent steps": summary["system"]["latent_steps"],
        "gradient": "cut at every hand-over" if summary["system"]["detach_trace"] else "exact, through every trace",
        "task": summary["task"]["task"],
        "model": summary["system"]["model_name_or_path"] or "embedded base",
        "training steps": summary.get("steps"),
        "time": f"{summary['seconds']} s, peak memory {summary['peak_memory_mb']} MB",
        "machine": ", ".join(f"{k} {v}" for k, v in summary["machine"].items()),
    }
    body = [heading(f"{summary['task']['task']}: what the trace carries", 1)]
    if rows := _accuracies(summary):
        body += [table(_COLUMNS, _cells(rows)), svg(_bars, rows)]
        missing = [f"Not evaluated: {LABELS[v]} ({reason})." for v, reason in summary.get("left_out", {}).items()]
        said = filter(None, [f"{summary['eval_items']} held-out items.", *missing, _carried(summary)])
        body.append(note(" ".join(said)))
    if any("loss" in entry for entry in metrics):
        body += [heading("Training"), svg(_curves, metrics)]
    if any(LATENT_NORMS in entry for entry in metrics):
        body += [
            heading("Gradients at latent steps"),
            svg(_gradients, (metrics, [agent["name"] for agent in topology["agents"]])),
        ]
        body.append(note("The norm of the gradient of every latent step's input, on its way back from the answer."))
    if (folder / PROFILE_FILE).is_file():
        profile = json.loads((folder / PROFILE_FILE).read_text())
        body += [heading("One step"), table(profiles.COLUMNS, profiles.rows(profile))]
        body.append(note(profiles.caption(profile)))
    body += [heading("Run"), table([], [(k, str(v)) for k, v in about.items() if v is not None], text=2)]
    path = folder / REPORT_FILE
    write_atomically(path, page("DiffMAS run", body))
    return path


def _carried(summary: dict[str, Any]) -> str:
    """What :func:`carried` found, in words; nothing where it found nothing."""
    if (found := summary.get("carried")) is None:
        return ""
    mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
    text = f"The row's own trace less another row's: {mean:+.1f} [{low:+.1f}, {high:+.1f}] points."
    if low <= 0:
        text += " The trained trace says no more of its row than another row's does: no communication was learnt."
    return text


def _field(variant: str) -> str:
    return "accuracy" if variant == "matched" else f"accuracy_{variant}"


def _accuracies(summary: dict[str, Any]) -> list[tuple[str, float, float | None]]:
    """Label, accuracy and share of cut answers of every variant; None where a summary does not say how many."""
    cut = summary.get("cut_by_length", {})
    return [(label, summary[_field(v)], cut.get(v)) for v, label in LABELS.items() if _field(v) in summary]


def _cells(rows: Sequence[tuple[str, float, float | None]]) -> list[tuple[str, str, str]]:
    return [(label, f"{100 * value:.1f} %", "–" if cut is None else f"{100 * cut:.1f} %") for label, value, cut in rows]


def _bars(plt, rows: Sequence[tuple[str, float, float | None]]):
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.45 * len(rows)))
    labels, values = [r[0] for r in rows][::-1], [100 * r[1] for r in rows][::-1]
    colors = ["#1f6feb" if label == LABELS["matched"] else "#afb8c1" for label in labels]
    axes.bar_label(axes.barh(labels, values, color=colors), fmt="%.1f", padding=3)
    axes.set(xlim=(0, 108), xlabel="accuracy, %")
    return figure


def _gradients(plt, found: tuple[Sequence[dict[str, Any]], Sequence[str]]):
    metrics, agents = found
    entries = [e for e in metrics if LATENT_NORMS in e]
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    norms = [[value for agent in e[LATENT_NORMS] for value in agent] for e in entries]
    labels = [f"{agents[i]} {t + 1}" for i, of in enumerate(entries[0][LATENT_NORMS]) for t in range(len(of))]
    for i, label in enumerate(labels):
        color = plt.cm.viridis(i / max(1, len(labels) - 1))
        axes.plot([e["step"] for e in entries], [row[i] for row in norms], color=color, label=label)
    axes.set(xlabel="training step", ylabel="norm of the gradient", yscale="log")
    # Pages draw text as it is, and a logarithmic axis writes formulas.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    # Of many, the first and the last say which way they go.
    shown = axes.lines if len(labels) <= 12 else [axes.lines[0], axes.lines[-1]]
    figure.legend(handles=shown, loc="outside right upper", frameon=False)
    return figure


def _curves(plt, metrics: Sequence[dict[str, Any]]):
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    losses = [(e["step"], e["loss"]) for e in metrics if "loss" in e]
    accuracies = [(e["step"], 100 * e["eval_accuracy"]) for e in metrics if "eval_accuracy" in e]
    axes.plot(*zip(*losses, strict=True), color="#57606a", label="training loss")
    if restating := [(e["step"], e[RESTATING_LOSS]) for e in metrics if RESTATING_LOSS in e]:
        axes.plot(*zip(*restating, strict=True), "--", color="#57606a", label="loss of restating")
    axes.set(xlabel="training step", ylabel="loss, nats a token", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    lines = [*axes.lines]
    if accuracies:
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        right.plot(*zip(*accuracies, strict=True), "o-", color="#1f6feb", label="held-out accuracy")
        right.set(ylabel="accuracy, %", ylim=(0, 103))
        lines += right.lines
    figure.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False)
    return figure
