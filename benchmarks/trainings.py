"""What the studies of single trainings share: run what is missing, keep summaries, put text where it is read."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compared import portable
from benchmarks.relay import ROOT
from diffmas.runs.files import METRICS_FILE, SUMMARY_FILE, SYSTEM_FILE
from diffmas.support.atomic import write_atomically

RESULTS = ROOT / "benchmarks" / "results"
#: Controls whose accuracies stand beside that of the row's own trace.
CONTROLS = ("mismatched", "zero", "noise")

Summary = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """One run of `python -m diffmas.train`.

    Args:
        arm, task, seed: what it is known by, and where it is kept.
        options: flags by name, without the folder and the seed.
    """

    arm: str
    task: str
    seed: int
    options: Mapping[str, Any]

    @property
    def place(self) -> Path:
        return Path(self.arm.replace(" ", "_"), self.task, f"seed-{self.seed}")

    def flags(self, folder: Path) -> list[str]:
        """Those of the command, with its run under `folder`; one that was begun goes on."""
        out = folder / self.place
        values = {**self.options, "seed": self.seed, "output_dir": out}
        if (out / SYSTEM_FILE).is_file():
            values["resume_from_checkpoint"] = out
        return [f"--{name}={value}" for name, value in values.items()]


def run(trainings: Iterable[Training], folder: Path, kept: Path) -> None:
    """What is not in `kept` yet, in the order given; runs are written under `folder`."""
    missing = [training for training in trainings if not (kept / training.place / SUMMARY_FILE).is_file()]
    for number, training in enumerate(missing, 1):
        where = training.place
        print(f"{number} of {len(missing)}: {training.arm}, {training.task}, seed {training.seed}", flush=True)
        if not (folder / where / SUMMARY_FILE).is_file():
            command = [sys.executable, "-m", "diffmas.train", *training.flags(folder)]
            subprocess.run(command, check=True, cwd=ROOT)
        (kept / where).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / where / METRICS_FILE, kept / where / METRICS_FILE)
        summary = portable(json.loads((folder / where / SUMMARY_FILE).read_text()))
        write_atomically(kept / where / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")


def found(kept: Path, arms: Iterable[str], tasks: Iterable[str]) -> dict[tuple[str, str], list[Summary]]:
    """Summaries by task and arm, in the orders given; a seed each."""
    by_cell: dict[tuple[str, str], list[Summary]] = {}
    arms = tuple(arms)
    for task in tasks:
        for arm in arms:
            paths = (kept / arm.replace(" ", "_") / task).glob(f"seed-*/{SUMMARY_FILE}")
            seeds = sorted(paths, key=lambda path: int(path.parent.name.removeprefix("seed-")))
            if seeds:
                by_cell[task, arm] = [json.loads(path.read_text()) for path in seeds]
    return by_cell


def percent(summaries: Iterable[Summary], name: str = "") -> list[float]:
    """Accuracies of a control, or of the row's own trace, in percent; of those summaries that have it."""
    key = f"accuracy_{name}" if name else "accuracy"
    return [100 * summary[key] for summary in summaries if key in summary]


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.0f}" if values else "–"


def machines(summaries: Iterable[Summary]) -> str:
    """What they ran on, and with which versions."""
    said = []
    for summary in summaries:
        machine, threads = summary["machine"], summary["machine"]["threads"]
        said.append(
            f"{machine['device']}, {threads} thread{'s' * (threads > 1)}, torch {machine['torch']}, "
            f"transformers {machine['transformers']}"
        )
    return "; ".join(dict.fromkeys(said))


def put(page: Path, name: str, text: str) -> None:
    """`text` between the marks of that name."""
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    before, rest = page.read_text().split(begin)
    write_atomically(page, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Flags of every study."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / name, help="where trainings are kept")
    parser.add_argument("--no-results", action="store_true", help="leave committed results and the page as they are")
    parser.add_argument("--render-only", action="store_true", help="only draw and rewrite the page from kept results")
    return parser


def chosen(parser: argparse.ArgumentParser, name: str, given: str, allowed: Iterable[str]) -> list[str]:
    """Names with commas between."""
    names, allowed = [part.strip() for part in given.split(",")], tuple(allowed)
    if unknown := [part for part in names if part not in allowed]:
        parser.error(f"{name} has {unknown}; allowed: {', '.join(allowed)}")
    return names
