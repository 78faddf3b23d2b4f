"""The table of verdicts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.models.comparison import CRASH, ORDER, WRONG
from benchmarks.models.configurations import LAYOUTS
from diffmas.support.atomic import write_atomically

BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"


def table(results: dict[str, Any]) -> str:
    """Families in alphabetical order of their model types, a column a layout, then what they were measured with."""
    found = results["families"]
    counts = Counter(_worst(layouts)["verdict"] for layouts in found.values())
    lines = [
        f"{len(found)} families: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()) + ".",
        "",
        "| model type | attention over everything | own layout | why |",
        "|---|---|---|---|",
    ]
    for family in sorted(found):
        layouts = found[family]
        cells = [_cell(layouts[name]) if name in layouts else "–" for name in LAYOUTS]
        whys = dict.fromkeys(v["why"] for v in layouts.values() if v["why"])
        whys |= dict.fromkeys(f"oracle: {v['oracle']}" for v in layouts.values() if v["oracle"])
        lines.append(f"| `{family}` | " + " | ".join(cells) + " | " + "; ".join(map(_escaped, whys)) + " |")
    of = results["machine"]
    devices = results.get("devices") or [of["device"]]
    lines += [
        "",
        f"Compared: {'; '.join(results['cases'])}. Worst relative error beside each verdict; float64, at most 1e-10 is "
        f"exact. {', '.join(devices)}, torch {of['torch']}, transformers {of['transformers']}. Made by "
        "`python -m benchmarks.models`.",
    ]
    return "\n".join(lines)


def write(results: dict[str, Any], page: Path) -> None:
    """The table between its marks in `page`, which is made where there is none."""
    text = page.read_text() if page.is_file() else f"# Models\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    write_atomically(page, f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}")


def _worst(layouts: dict[str, Any]) -> dict[str, Any]:
    return min(layouts.values(), key=lambda v: ORDER.index(v["verdict"]))


def _cell(verdict: dict[str, Any]) -> str:
    word = f"**{verdict['verdict']}**" if verdict["verdict"] in (WRONG, CRASH) else verdict["verdict"]
    return word if verdict["error"] is None else f"{word} {verdict['error']:.0e}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
