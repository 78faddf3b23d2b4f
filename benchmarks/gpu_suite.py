"""Build, check and measure everything in one go: `python -m benchmarks.gpu_suite --out DIR --minutes 8`.

The most important cases come first and `results.json` is complete JSON after every one of them, so that a run that
is cut off still counts. Runs on a CUDA machine without network; `--device cpu` runs the same on the processor.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS_FILE, write

ROOT = Path(__file__).resolve().parents[1]
#: Seconds a case's timing aims at, and the share of the run that building and checking may take at most.
CASE_SECONDS, CHECK_SHARE = {"cuda": 0.4, "cpu": 1.0}, 0.4


class Results:
    """`results.json`, whole after every change."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RESULTS_FILE
        self.data: dict[str, Any] = {
            "environment": {}, "checks": [], "ceilings": {}, "results": [], "failures": [], "complete": False
        }  # fmt: skip

    def save(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")
        os.replace(partial, self._path)


def run_cases(
    results: Results, cases: Iterator[tuple[str, Callable[[], dict]]], deadline: float, clock: Callable = time.monotonic
) -> None:
    """Measure `(name, measure)` in turn until `deadline`; an error is a failure of that case alone."""
    for name, measure in cases:
        if clock() > deadline:
            results.save()
            return
        try:
            results.data["results"].append(measure())
        except Exception as error:  # One case's trouble shall not end the run.
            results.data["failures"].append({"case": name, "error": f"{type(error).__name__}: {error}"[:500]})
        results.save()
        print(f"{datetime.datetime.now():%H:%M:%S} {name}", flush=True)
    results.data["complete"] = True
    results.save()


def check(results: Results, name: str, command: list[str], seconds: float) -> None:
    """Run a command of the build or the tests and keep how it ended."""
    begin = time.monotonic()
    # A group of its own, so that a compiler started by the build ends with it.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0] + f"\nnot finished after {seconds:.0f} s"
    code = process.returncode
    entry = {"name": name, "returncode": code, "seconds": round(time.monotonic() - begin, 1), "tail": output[-2000:]}
    results.data["checks"].append(entry)
    results.save()
    print(f"{name}: {'ok' if code == 0 else output[-2000:]}", flush=True)


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """What results have to be read with."""
    import torch

    from diffmas.machine import machine

    if commit is None:
        commit = _output(["git", "describe", "--always", "--dirty", "--abbrev=12"])
    gpu = device == "cuda"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return machine() | {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "system": platform.platform(),
        "driver": _output(query) if gpu else None,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "load average": list(os.getloadavg()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def experiments(device: str) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Every case's name and how to measure it: the operators' first few, the step, the rest."""
    from benchmarks import cases, operators, step
    from benchmarks.experiment import measure
    from benchmarks.timing import Clock

    clock = Clock(device)

    def one(build, *arguments):
        return lambda: measure(build(*arguments, device), seconds=CASE_SECONDS[device], clock=clock)

    singles = [
        (f"{type(case).__name__} {direction}: {case.label}", one(operators.build, case, direction))
        for case in cases.operator_cases(device)
        for direction in operators.directions(case)
    ]
    steps = [(f"step: {case.label}", one(step.build, case)) for case in cases.step_cases(device)]
    yield from singles[:12] + steps + singles[12:]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, report.md and plots")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop, build and checks included")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="git commit to record where the folder is no repository")
    parser.add_argument("--skip-checks", action="store_true", help="measure only: no build, no tests")
    args = parser.parse_args(arguments)
    begin = time.monotonic()
    results = Results(args.out)
    results.save()
    if not args.skip_checks:
        share = 60 * args.minutes * CHECK_SHARE
        check(results, "build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], share)
        marked = ["-m", "gpu"] if args.device == "cuda" else []
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/ops", *marked]
        check(results, "tests", tests, share + begin - time.monotonic())

    # Not before the build: importing the operators loads the library it makes.
    import torch

    from benchmarks import ceilings

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device is cuda, but torch.cuda.is_available() is False; allowed: cpu")
    results.data["environment"] = environment(args.device, args.commit)
    dtypes = ["bfloat16", "float32"] if args.device == "cuda" else ["float32"]
    results.data["ceilings"] = ceilings.measure(args.device, dtypes)
    results.save()
    run_cases(results, experiments(args.device), begin + 60 * args.minutes)
    print(write(args.out))


if __name__ == "__main__":
    main()
