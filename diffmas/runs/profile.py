"""A profiled training step for people: a row a phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("phase", "ms", "share", "floor, ms", "of floor")


def rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Phase, milliseconds, share of the step, floor in milliseconds, floor over time."""
    phases = result["phases"] | {"step": {k: result[k] for k in ("seconds", "floor_seconds")}}
    for name, phase in phases.items():
        spent, floor = phase["seconds"], phase.get("floor_seconds")
        yield (
            name,
            f"{1e3 * spent:.2f}",
            f"{100 * spent / result['seconds']:.1f} %",
            "" if floor is None else f"{1e3 * floor:.2f}",
            f"{100 * floor / spent:.0f} %" if floor and spent else "",
        )


def caption(result: Mapping[str, Any]) -> str:
    return (
        f"{result['tokens']} tokens in {result['micro_batches']} micro-batches, {result['tokens_per_second']:.4g} "
        f"tokens/s, {100 * result['model_flops_utilisation']:.1f} % of the {result['dtype']} matmul rate of "
        f"{result['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s, copy {result['copy_bytes_per_second'] / 1e9:.3g} GB/s"
    )


def print_profile(result: Mapping[str, Any]) -> None:
    table = Table(title="one training step", caption=caption(result))
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows(result):
        table.add_row(*row)
    Console().print(table)
