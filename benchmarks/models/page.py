"""The table of verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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


def differences(results: dict[str, Any], other: dict[str, Any]) -> str:
    """What came out in another version of transformers, `other`: counts, and the families whose verdict differs."""
    found, here = other["families"], results["families"]
    counts = Counter(_worst(layouts)["verdict"] for layouts in found.values())
    lines = [
        f"transformers {other['machine']['transformers']}: {len(found)} families: "
        + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
        + f". {len(here.keys() - found.keys())} of the table are not in it."
    ]
    rows = []
    for family in sorted(found.keys() & here.keys()):
        then, now = (_worst(layouts) for layouts in (found[family], here[family]))
        if then["verdict"] != now["verdict"]:
            rows.append(f"| `{family}` | {_cell(then)} | {_cell(now)} | {_escaped(then['why'])} |")
    if rows:
        lines += ["", "| model type | there | in the table | why |", "|---|---|---|---|", *rows]
    return "\n".join(lines)


def write(results: dict[str, Any], page: Path, others: Sequence[dict[str, Any]] = ()) -> None:
    """The table between its marks in `page`, which is made where there is none; `others`: of other versions."""
    body = "\n\n".join([table(results), *(differences(results, other) for other in others)])
    text = page.read_text() if page.is_file() else f"# Models\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    write_atomically(page, f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}")


def _worst(layouts: dict[str, Any]) -> dict[str, Any]:
    return min(layouts.values(), key=lambda v: ORDER.index(v["verdict"]))


def _cell(verdict: dict[str, Any]) -> str:
    word = f"**{verdict['verdict']}**" if verdict["verdict"] in (WRONG, CRASH) else verdict["verdict"]
    return word if verdict["error"] is None else f"{word} {verdict['error']:.0e}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
