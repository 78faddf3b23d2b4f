"""Build, check and measure everything in one go: `python -m benchmarks.gpu_suite --out DIR --minutes 8`.

The most important cases come first and `results.json` is complete JSON after every one of them, so that a run that
is cut off still counts. Runs on a CUDA machine without network; `--device cpu` runs the same on the processor.
`--what` does a part alone: `checks` (build, tests, compute-sanitizer), `operators`, or `steps` (training steps of
models with 4 and 8 billion weights). The build needs CMake and nvcc; without CMake, libraries that lie in
`diffmas_ops/` already are used (the stable ABI lets those of another machine serve, too).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS_FILE, write

ROOT = Path(__file__).resolve().parents[1]
#: Seconds a case's timing aims at, and the share of a whole run that building and checking may take at most.
CASE_SECONDS, CHECK_SHARE = {"cuda": 0.4, "cpu": 1.0}, 0.5
STEP_SECONDS = 5.0
PARTS = ("checks", "operators", "steps")
#: Operator tests under compute-sanitizer, which is a hundred times slower: every kernel at a size or two.
SANITIZED = "(head_dims or append or in_parts or merge or overlapping) and not float64"


class Results:
    """`results.json`, whole after every change."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RESULTS_FILE
        self.data: dict[str, Any] = {
            "environment": {}, "checks": [], "ceilings": {}, "results": [], "largest batches": [], "failures": [],
            "complete": False,
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
            measured = measure()
            # Only a search for the largest batch gives several records at once.
            kind = "largest batches" if isinstance(measured, list) else "results"
            results.data[kind] += measured if isinstance(measured, list) else [measured]
        except Exception as error:  # One case's trouble shall not end the run.
            results.data["failures"].append({"case": name, "error": f"{type(error).__name__}: {error}"[:500]})
        results.save()
        print(f"{datetime.datetime.now():%H:%M:%S} {name}", flush=True)
    results.data["complete"] = True
    results.save()


def check(
    results: Results, name: str, command: list[str], seconds: float, variables: dict[str, str] | None = None
) -> None:
    """Run a command of the build or the tests and keep how it ended."""
    begin = time.monotonic()
    # A group of its own, so that a compiler started by the build ends with it.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | (variables or {}),
    )  # fmt: skip
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


def run_checks(results: Results, device: str, seconds: float) -> None:
    """Build the libraries, then run the operators' tests on the device, and under compute-sanitizer where it is."""
    deadline = time.monotonic() + seconds

    def run(name: str, *command: str, share: float, **options) -> None:
        check(results, name, [sys.executable, *command], share * (deadline - time.monotonic()), **options)

    if shutil.which("cmake"):
        run("build", "setup.py", "-q", "build_ext", "--inplace", share=0.5)
    run("libraries", "-m", "diffmas_ops.doctor", share=0.2)
    # Compiling Triton's kernels is most of the time, and the processor's.
    spread = ["-n", str(min(8, os.cpu_count() or 1))] if _version("pytest-xdist") else []
    pytest = ["-m", "pytest", "-q", "--maxfail=50", "-p", "no:cacheprovider"]
    if device == "cpu":
        return run("tests", *pytest, *spread, "tests/ops", share=1.0)
    run("CUDA operators", *pytest, "-m", "gpu", "tests/ops", share=0.3)
    run(
        "Triton operators, schemas",
        *pytest,
        *spread,
        "tests/ops/test_triton.py",
        "tests/ops/test_opcheck.py",
        share=0.5,
    )
    run("system", *pytest, "-m", "gpu", "tests", "--ignore", "tests/ops", share=0.4)
    if (sanitizer := _sanitizer()) is None:
        results.data["checks"].append({"name": "sanitizer", "skipped": "compute-sanitizer was not found"})
        return results.save()
    for tool in ("memcheck", "racecheck"):
        tests = [sys.executable, *pytest, "-x", "tests/ops/test_cuda.py", "-k", SANITIZED]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *tests]
        # Without torch's cache every tensor is an allocation that the tool sees the end of.
        share = 0.6 if tool == "memcheck" else 1.0
        check(
            results, tool, command, share * (deadline - time.monotonic()),
            variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip


def _sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)])
    return shutil.which("compute-sanitizer", path=path)


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """What results have to be read with, as far as it can be told before the libraries are built."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _output(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "system": platform.platform(),
        "driver": _output(query) if device == "cuda" else None,
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


def experiments(device: str, parts: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every case's name and how to measure it: the operators' first few, the steps, the rest."""
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
    if "operators" in parts:
        yield from singles[:12]
    if "steps" in parts:
        yield from steps
        if device == "cuda":
            yield from model_steps(device, clock, one)
    if "operators" in parts:
        yield from singles[12:]


def model_steps(device: str, clock, one) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Of each model: a check, the step at every batch, latent steps, and the largest batch, which takes longest."""
    from benchmarks import model_steps as models
    from benchmarks.cases import MODEL_BATCHES, MODEL_STEPS

    options = dict(device=device, clock=clock, seconds=STEP_SECONDS)
    for model in MODEL_STEPS:
        yield f"checked step: {model.label}", one(models.checked, model)
        for batch in MODEL_BATCHES:
            case = replace(model, batch=batch)
            yield f"step: {case.label}", partial(models.whole, case, **options)
        yield f"latent steps: {model.label}", partial(models.latent_rollout, model, **options)
    for model in MODEL_STEPS:
        yield f"largest batch: {model.label}", partial(models.batches_that_fit, model, device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, report.md and plots")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop, build and checks included")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--what", choices=(*PARTS, "all"), default="all", help="a part of the suite alone")
    parser.add_argument("--commit", help="git commit to record where the folder is no repository")
    args = parser.parse_args(arguments)
    begin = time.monotonic()
    parts = PARTS if args.what == "all" else (args.what,)
    results = Results(args.out)
    results.data["environment"] = environment(args.device, args.commit)
    results.save()
    if "checks" in parts:
        run_checks(results, args.device, 60 * args.minutes * (CHECK_SHARE if len(parts) > 1 else 1))

    # Not before the build: importing the operators loads the library it makes.
    import torch

    from benchmarks import ceilings
    from diffmas.support.machine import machine

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device is cuda, but torch.cuda.is_available() is False; allowed: cpu")
    results.data["environment"] |= machine() | {"cuda": torch.version.cuda}
    dtypes = ["bfloat16", "float32"] if args.device == "cuda" else ["float32"]
    results.data["ceilings"] = ceilings.measure(args.device, dtypes)
    results.save()
    run_cases(results, experiments(args.device, parts), begin + 60 * args.minutes)
    print(write(args.out))


if __name__ == "__main__":
    main()
