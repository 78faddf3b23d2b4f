"""`python -m benchmarks.sweeps`: latent rollouts differentiated by k parallel sweeps against step by step.

Trains the default relay with the exact gradient and with sweeps; measures gradient error, time and memory against k
on that task, before and after the training, and on a random Qwen3-shaped model. Keeps `results.json` and
`sweeps.svg` under `benchmarks/results/sweeps/` and puts the tables into `docs/sweeps.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from benchmarks.cases import Step
from benchmarks.experiment import WrongResult, relative_error
from benchmarks.memory import saved_bytes
from benchmarks.relay import ROOT
from benchmarks.step import lora_model, tokens
from benchmarks.timing import Clock, race
from diffmas.agents.collator import Collator
from diffmas.agents.sweeps import latent_rollout
from diffmas.agents.topology import TOPOLOGIES
from diffmas.loading import build_system, load_run
from diffmas.runs.files import METRICS_FILE, SUMMARY_FILE
from diffmas.runs.metrics import read_metrics
from diffmas.support.machine import machine
from diffmas.system import MultiAgentSystem
from diffmas.tasks import load_task

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "sweeps", ROOT / "docs" / "sweeps.md"
RESULTS_FILE, PLOT_FILE = "results.json", "sweeps.svg"
BEGIN, END = "<!-- sweeps: begin -->", "<!-- sweeps: end -->"
#: Relative error of the gradient up to which as many sweeps as steps count as exact, in float32.
TOLERANCE = 1e-5
TRAINED = ("exact", "sweeps:1", "sweeps:2", "sweeps:4")
RANDOM = Step(4, 256, 768, 4, 2, 64, 512, 4, 64, 16, 16, 4, "float32")

Record = dict[str, Any]
Inputs = dict[str, Any]


def train(folder: Path, latent_backward: str, seed: int) -> Record:
    """The default training run into `folder`; accuracies, and the one on the way by step."""
    flags = ["--latent_backward", latent_backward, "--seed", str(seed), "--output_dir", str(folder)]
    subprocess.run([sys.executable, "-m", "diffmas.train", *flags, "--disable_tqdm", "true"], check=True, cwd=ROOT)
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    curve = [(e["step"], e["eval_accuracy"]) for e in read_metrics(folder / METRICS_FILE) if "eval_accuracy" in e]
    kept = [key for key in summary if key.startswith("accuracy")]
    return {"latent_backward": latent_backward, "seed": seed, "curve": curve} | {key: summary[key] for key in kept}


def cases(trained: Path) -> Iterator[tuple[str, MultiAgentSystem, Inputs]]:
    """Label, system and one batch of each case; `trained` is the folder of a finished relay run."""
    run = load_run(trained)
    task = load_task(run.task)
    set_seed(0)
    rows = [task.train[i] for i in range(128)]
    inputs = Collator(run.system.topology, task.prompts, run.tokenizer)(rows)
    yield "relay, untrained", build_system(run.args)[0], inputs
    yield "relay, trained", run.system, inputs
    prompts, answer = tokens(RANDOM, "cpu")
    system = MultiAgentSystem(lora_model(RANDOM, "cpu"), TOPOLOGIES["sequential"], latent_steps=RANDOM.latent)
    lengths = [[RANDOM.prompt] * RANDOM.batch] * RANDOM.agents
    yield (
        "random Qwen3-shaped model", system, dict(
            prompt_ids=[p.flatten() for p in prompts], prompt_lengths=lengths,
            answer_ids=answer.flatten(), answer_lengths=[RANDOM.answer] * RANDOM.batch,
        ),
    )  # fmt: skip


def measure(label: str, system: MultiAgentSystem, inputs: Inputs, *, seconds: float, clock: Clock) -> Record:
    """Gradient error, time (forward and backward, interleaved) and saved bytes of exact and of k = 1, 2, 4 … m sweeps.

    Raises:
        WrongResult: as many sweeps as steps do not give the exact gradient; nothing is timed then.
    """
    m = system.latent_steps
    counts = [k for k in (1, 2, 3, 4, 6, 8, 12, 16) if k < m] + [m]
    names = ["exact", *(f"sweeps:{k}" for k in counts)]
    system.train()

    def prepare(name: str) -> None:
        system.trajectory = replace(system.trajectory, latent_rollout=latent_rollout(name))
        system.zero_grad()

    def run(_) -> None:
        system(**inputs).loss.backward()

    found: dict[str, tuple[Tensor, int]] = {}
    for name in names:
        prepare(name)
        saved, loss = saved_bytes(lambda: system(**inputs).loss, system)
        loss.backward()
        grads = [p.grad.flatten() for p in system.parameters() if p.grad is not None]
        found[name] = torch.cat(grads).clone(), saved
    exact, _ = found["exact"]
    if (error := relative_error(found[names[-1]][0], exact)) > TOLERANCE:
        raise WrongResult(f"{label}: error of {names[-1]} is {error:.1e}; allowed: {TOLERANCE}")
    timed = {name: (lambda name=name: prepare(name), run) for name in names}
    lap = sum(clock.seconds(run, timed[name][0]()) for name in names)
    times = race(timed, clock, seconds=seconds, round_seconds=lap)
    rows = [
        {
            "latent_backward": name,
            "error": relative_error(gradient, exact),
            "cosine": float(torch.cosine_similarity(gradient.double(), exact.double(), dim=0)),
            "median_s": times[name].median_s,
            "rounds": times[name].rounds,
            "saved_bytes": saved,
        }
        for name, (gradient, saved) in found.items()
    ]
    return {"label": label, "latent_steps": m, "rows": rows}


def tables(results: Record) -> str:
    """The results as Markdown."""
    lines = []
    for case in results["cases"]:
        exact = case["rows"][0]
        lines += [
            f"**{case['label']}**, m = {case['latent_steps']}",
            "",
            "| | gradient error | cosine | time |",
            "|---|---:|---:|---:|",
        ]
        for row in case["rows"]:
            error = "–" if row is exact else f"{row['error']:.1e}"
            time = row["median_s"] / exact["median_s"]
            lines.append(f"| {row['latent_backward']} | {error} | {row['cosine']:.4f} | {time:.2f} |")
        lines.append("")
    seeds = sorted({run["seed"] for run in results["training"]})
    kinds = {"accuracy": "own trace", "accuracy_mismatched": "another row's"}
    heads = [f"{label}, seed {seed}" for label in kinds.values() for seed in seeds]
    lines += ["| relay, trained | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in dict.fromkeys(run["latent_backward"] for run in results["training"]):
        runs = {run["seed"]: run for run in results["training"] if run["latent_backward"] == name}
        lines.append(
            f"| {name} | " + " | ".join(f"{100 * runs[s][kind]:.1f} %" for kind in kinds for s in seeds) + " |"
        )
    where = results["machine"]
    lines += ["", f"{where['device']}, {where['threads']} threads, torch {where['torch']}, transformers "
              f"{where['transformers']}. Made by `python -m benchmarks.sweeps`."]  # fmt: skip
    return "\n".join(lines)


def plot(results: Record, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "svg.hashsalt": ""})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for case in results["cases"]:
        points = [(int(row["latent_backward"].split(":")[1]), row["error"]) for row in case["rows"][1:]]
        left.semilogy(*zip(*points, strict=True), "o-", label=f"{case['label']}, m = {case['latent_steps']}")
    left.set(xlabel="sweeps k", ylabel="relative error of the gradient")
    left.legend(frameon=False, loc="lower left")
    colors = dict(zip(TRAINED, ("black", "tab:blue", "tab:orange", "tab:red"), strict=True))
    for i, run in enumerate(results["training"]):
        name = run["latent_backward"]
        start = (0, run["accuracy_training_free"])
        points = [(step, 100 * accuracy) for step, accuracy in (start, *run["curve"])]
        # The exact curve lies under that of as many sweeps as steps.
        style = dict(linewidth=5, alpha=0.3) if name == "exact" else dict(marker="o", markersize=4)
        label = name if i < len(TRAINED) else None
        right.plot(*zip(*points, strict=True), color=colors[name], label=label, **style)
    right.set(xlabel="training step", ylabel="relay: held-out accuracy, %", ylim=(0, 103))
    right.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweeps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--render-only", action="store_true", help="only draw and rewrite the page from kept results")
    parser.add_argument("--seconds", type=float, default=60, help="time for the race of each case")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43], help="of the relay's training runs")
    parser.add_argument("--training-only", action="store_true", help="keep the other results, and those of other seeds")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not args.render_only:
        kept = json.loads((RESULTS / RESULTS_FILE).read_text()) if args.training_only else {"training": []}
        with tempfile.TemporaryDirectory() as folder:

            def into(name: str, seed: int) -> Path:
                return Path(folder, f"{name.replace(':', '-')}-{seed}")

            training = [train(into(name, seed), name, seed) for seed in args.seeds for name in TRAINED]
            others = [run for run in kept["training"] if run["seed"] not in args.seeds]
            results = kept | {"training": others + training}
            if not args.training_only:
                clock, trained = Clock("cpu"), into("exact", args.seeds[0])
                measured = [measure(*case, seconds=args.seconds, clock=clock) for case in cases(trained)]
                results = {"machine": machine(), "cases": measured} | results
        (RESULTS / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads((RESULTS / RESULTS_FILE).read_text())
    plot(results, RESULTS / PLOT_FILE)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(results)}\n{END}{rest.split(END)[1]}")
    print(tables(results))


if __name__ == "__main__":
    main()
