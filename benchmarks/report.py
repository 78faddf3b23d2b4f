"""Results as a table on the terminal, as Markdown and as plots: `python -m benchmarks.report DIR`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS_FILE, REPORT_FILE = "results.json", "report.md"
COLUMNS = (
    "implementation",
    "time",
    "quartiles",
    "achieved",
    "of ceiling",
    "peak",
    "saved",
    "ours is faster by",
    "error",
)

Result = dict[str, Any]


@dataclass(frozen=True)
class Floor:
    """The least time a result's work takes on this machine, and what binds it."""

    seconds: float
    amount: float
    unit: str

    @classmethod
    def of(cls, result: Result, ceilings: dict[str, float]) -> Floor:
        copying = result["bytes"] / ceilings["copy"]
        computing = result["flops"] / ceilings[result["case"]["dtype"]]
        if copying > computing:
            return cls(copying, result["bytes"], "B/s")
        return cls(computing, result["flops"], "FLOP/s")


def best_peer(result: Result) -> dict[str, Any] | None:
    """The fastest contender that is none of our implementations (`reference` is ours too)."""
    own = {*result["implementations"], result["ours"], "reference"}
    peers = [c for c in result["contenders"] if "median_s" in c and c["name"] not in own]
    return min(peers, key=lambda c: c["median_s"], default=None)


def contender(result: Result, name: str) -> dict[str, Any]:
    return next(c for c in result["contenders"] if c["name"] == name)


def speedup(result: Result) -> float | None:
    """How many times faster ours is than the best peer."""
    peer = best_peer(result)
    return peer and peer["median_s"] / contender(result, result["ours"])["median_s"]


def rows(result: Result, ceilings: dict[str, float]) -> Iterator[tuple[str, ...]]:
    """One row of :data:`COLUMNS` a contender."""
    floor = Floor.of(result, ceilings)
    ours = contender(result, result["ours"])["median_s"]
    for c in result["contenders"]:
        error = _worst(c, result["allowed_error"]) if "errors" in c else ""
        if "median_s" not in c:
            yield (c["name"], c.get("unavailable", "checked only"), "", "", "", "", "", "", error)
            continue
        yield (
            c["name"] + (" ←" if c["name"] == result["ours"] else ""),
            _scaled(c["median_s"], "s"),
            f"{_scaled(c['low_s'], 's')} … {_scaled(c['high_s'], 's')}",
            _scaled(floor.amount / c["median_s"], floor.unit),
            f"{100 * floor.seconds / c['median_s']:.0f} %",
            _scaled(c["peak_bytes"], "B"),
            _scaled(c["saved_bytes"], "B") if "saved_bytes" in c else "",
            f"{c['median_s'] / ours:.2f} ×",
            error,
        )


def print_results(results: list[Result], ceilings: dict[str, float], console: Console | None = None) -> None:
    """A table for the terminal."""
    table = Table(title=_ceilings(ceilings), title_justify="left")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for result in results:
        table.add_section()
        table.add_row(f"[bold]{_title(result)}[/bold]")
        for row in rows(result, ceilings):
            table.add_row(*row)
    (console or Console(width=170)).print(table)


def write(folder: str | Path) -> Path:
    """`report.md` and its plots from the folder's `results.json`; returns the report's path.

    Raises:
        FileNotFoundError: a folder without results.
    """
    folder = Path(folder)
    if not (folder / RESULTS_FILE).is_file():
        raise FileNotFoundError(
            f"DIR {folder} has no {RESULTS_FILE}; allowed: a folder written by benchmarks.gpu_suite"
        )
    data = json.loads((folder / RESULTS_FILE).read_text())
    lines = ["# Benchmark results", "", *_about(data)]
    for name in _plots(folder, data["results"], data["ceilings"]):
        lines += [f"![{name.removesuffix('.svg')}]({name})", ""]
    for result in data["results"]:
        lines += [f"## {_title(result)}", "", "| " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * 8 + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows(result, data["ceilings"])] + [""]
    if data.get("largest batches"):
        lines += [
            "## Largest batch that fits",
            "",
            "| step | | batch | memory beyond the weights |",
            "|---|---|--:|--:|",
        ]
        for one in data["largest batches"]:
            peak = _scaled(one["peak_bytes"], "B") if one["peak_bytes"] is not None else ""
            lines += [f"| {one['label']} | {one['name']} | {one['batch']} | {peak} |"]
        lines += [""]
    if data["failures"]:
        lines += ["## Failed", "", *(f"- {f['case']}: {f['error']}" for f in data["failures"]), ""]
    path = folder / REPORT_FILE
    path.write_text("\n".join(lines))
    return path


def _about(data: dict[str, Any]) -> list[str]:
    about = [f"- {key}: {value}" for key, value in data["environment"].items()]
    whole = "complete" if data["complete"] else "cut off before the last case"
    checks = [
        f"{c['name']} {c.get('skipped') or ('ok' if c['returncode'] == 0 else 'FAILED')}"
        for c in data.get("checks", [])
    ]
    return [
        *about,
        *([f"- checks: {', '.join(checks)}"] if checks else []),
        f"- {_ceilings(data['ceilings'])}",
        f"- run: {whole}",
        "",
        "Times are medians of interleaved runs. `←` is what `auto` picks; the speed-up is its over that row. An error "
        "is the largest relative one against float64 (of a whole model's step: against the peer's own numbers), with "
        "what is allowed in brackets. Bytes and FLOPs are counted by hand; the ceilings were measured in the same run.",
        "",
    ]


def _title(result: Result) -> str:
    direction = "" if result["direction"] == result["operator"] else f" {result['direction']}"
    return f"{result['operator']}{direction}: {result['label']}, {result['case']['dtype']}"


def _worst(c: dict[str, Any], allowed: dict[str, float]) -> str:
    """The error closest to (or furthest beyond) what is allowed of it."""
    name = max(allowed, key=lambda name: c["errors"][name] / allowed[name] if allowed[name] else c["errors"][name])
    return f"{c['errors'][name]:.1e} ({allowed[name]:.1e})"


def _ceilings(ceilings: dict[str, float]) -> str:
    rates = [f"{_scaled(rate, 'FLOP/s')} {name} matmul" for name, rate in ceilings.items() if name != "copy"]
    return f"ceilings: {_scaled(ceilings['copy'], 'B/s')} copy, " + ", ".join(rates)


def _scaled(value: float, unit: str) -> str:
    """Three digits and an SI prefix."""
    if value == 0:
        return f"0 {unit}"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value * 1e6:.3g} µ{unit}"


def _plots(folder: Path, results: list[Result], ceilings: dict[str, float]) -> Iterator[str]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawings = {
        "speedup.svg": _speedups(results),
        "ceiling.svg": _fractions(results, ceilings),
    }
    for name, (values, label) in drawings.items():
        if not values:
            continue
        # A fixed salt and no date: the same results give the same file.
        with plt.rc_context({"svg.hashsalt": "diffmas", "axes.spines.top": False, "axes.spines.right": False}):
            figure, axes = plt.subplots(figsize=(9, 0.8 + 0.28 * len(values)))
            names, heights = zip(*reversed(values.items()), strict=True)
            axes.bar_label(axes.barh(names, heights, color="#1f6feb"), fmt="%.3g", padding=3, fontsize=7)
            axes.axvline(1 if name == "speedup.svg" else 100, color="#57606a", linewidth=0.8)
            axes.set(xlabel=label, xscale="log" if name == "speedup.svg" else "linear")
            axes.tick_params(axis="y", labelsize=7)
            figure.savefig(folder / name, format="svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
        yield name


def _speedups(results: list[Result]) -> tuple[dict[str, float], str]:
    values = {_title(r): speedup(r) for r in results}
    return {k: v for k, v in values.items() if v is not None}, "times faster than the best peer"


def _fractions(results: list[Result], ceilings: dict[str, float]) -> tuple[dict[str, float], str]:
    return {
        _title(r): 100 * Floor.of(r, ceilings).seconds / contender(r, r["ours"])["median_s"] for r in results
    }, "percent of the ceiling measured in the same run"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("DIR", type=Path, help=f"folder that holds {RESULTS_FILE}")
    folder = parser.parse_args().DIR
    data = json.loads(write(folder).with_name(RESULTS_FILE).read_text())
    print_results(data["results"], data["ceilings"])
    print(folder / REPORT_FILE)


if __name__ == "__main__":
    main()
