"""`python -m benchmarks.models`: every decoder of transformers, small, against itself recomputing what moved.

Trains and decodes on each as agents do and compares loss, logits, every gradient, tokens and log-probabilities, in
float64, with :mod:`benchmarks.models.oracle`. Keeps `benchmarks/results/models/results.json`; `--write` puts the table
into a page, and what came out with other versions of transformers, kept beside it as `transformers-VERSION.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from benchmarks.models.comparison import CASES, QUICK
from benchmarks.models.configurations import families
from benchmarks.models.page import write
from benchmarks.models.walk import walk
from benchmarks.relay import ROOT
from diffmas.support.atomic import write_atomically
from diffmas.support.machine import machine
from diffmas.support.progress import Lines, terminal

RESULTS = ROOT / "benchmarks" / "results" / "models" / "results.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="model types, with commas between; the other results are kept")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page, e.g. docs/models.md")
    parser.add_argument("--render-only", action="store_true", help="run nothing; only write the page from kept results")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} of the {len(CASES)} comparisons a layout")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="families at once")
    parser.add_argument("--limit", type=float, default=600, help="seconds a family may take")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else families()
    if unknown := sorted(set(chosen) - set(families())):
        parser.error(f"--only has {unknown}; allowed: {', '.join(families())}")
    results = json.loads(args.results.read_text()) if args.results.is_file() else {"families": {}}
    if not args.render_only:
        _run(results, chosen, args)
    if args.write:
        others = sorted(args.results.parent.glob("transformers-*.json"))
        write(results, args.write, [json.loads(path.read_text()) for path in others])


def _run(results: dict[str, Any], chosen: list[str], args: argparse.Namespace) -> None:
    console = Console(width=None if terminal() else 200)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    cases = QUICK if args.quick else CASES
    # Of the results that are kept, too.
    kept = _devices(results) if args.only else []
    results |= {"machine": machine(), "cases": [str(case) for case in cases]}
    results["devices"] = list(dict.fromkeys([*kept, results["machine"]["device"]]))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with Progress(*columns, console=console) if terminal() else Lines(True) as progress:
        task = progress.add_task("model families", len(chosen))
        for family, verdicts in walk(chosen, cases=cases, jobs=args.jobs, limit=args.limit):
            results["families"][family] = {layout: asdict(verdict) for layout, verdict in verdicts.items()}
            results["families"] = dict(sorted(results["families"].items()))
            write_atomically(args.results, json.dumps(_finite(results), indent=1) + "\n")
            for layout, v in verdicts.items():
                told = [f"{family} ({layout}):", v.verdict, "" if v.error is None else f"{v.error:.1e}", v.why]
                told += [f"oracle: {v.oracle}"] if v.oracle else []
                console.print(" ".join(filter(None, told)), markup=False, highlight=False)
            progress.advance(task)


def _devices(results: dict[str, Any]) -> list[str]:
    return results.get("devices") or ([results["machine"]["device"]] if "machine" in results else [])


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
