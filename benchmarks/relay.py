"""`python -m benchmarks.relay`: the README's relay result, from the default training run.

Runs `python -m diffmas.train` as it is and with `--detach_trace`, keeps both summaries and metrics under
`benchmarks/results/relay/`, draws `relay.png` from them and puts the table into README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from diffmas.evaluation.evaluator import VARIANTS
from diffmas.runs.files import METRICS_FILE, SUMMARY_FILE
from diffmas.runs.metrics import read_metrics

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "relay"
RUNS = {"exact": [], "detached": ["--detach_trace", "true"]}
LABELS = {"exact": "exact gradients", "detached": "gradient cut at the hand-over"}
BEGIN, END = "<!-- relay: begin -->", "<!-- relay: end -->"


def run(flags: list[str]) -> None:
    """Train each variant from scratch and keep its summary and metrics."""
    for name, extra in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, name)
            subprocess.run(
                [sys.executable, "-m", "diffmas.train", *extra, *flags, "--output_dir", str(out)], check=True, cwd=ROOT
            )
            (RESULTS / name).mkdir(parents=True, exist_ok=True)
            for file in (SUMMARY_FILE, METRICS_FILE):
                shutil.copy(out / file, RESULTS / name / file)


def table(summaries: dict[str, dict]) -> str:
    """The accuracies as a Markdown table, a column per run."""
    lines = [
        "| held-out accuracy | " + " | ".join(LABELS[n] for n in summaries) + " |",
        "|---|" + "---:|" * len(summaries),
    ]
    for variant, label in VARIANTS.items():
        key = "accuracy" if variant == "matched" else f"accuracy_{variant}"
        lines.append(f"| {label} | " + " | ".join(f"{100 * s[key]:.1f} %" for s in summaries.values()) + " |")
    seconds = " | ".join(f"{s['seconds']:.0f} s" for s in summaries.values())
    first = next(iter(summaries.values()))
    machine = first["machine"]
    lines += [f"| whole command | {seconds} |", ""]
    lines += [
        f"{first['eval_items']} held-out items; {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, transformers {machine['transformers']}. Made by `python -m benchmarks.relay`."
    ]
    return "\n".join(lines)


def plot(summaries: dict[str, dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[1, 1.15], layout="constrained")
    colors = {"exact": "#1f6feb", "detached": "#bf8700"}
    for name in summaries:
        points = [
            (e["step"], 100 * e["eval_accuracy"])
            for e in read_metrics(RESULTS / name / METRICS_FILE)
            if "eval_accuracy" in e
        ]
        left.plot(
            *zip((0, 100 * summaries[name]["accuracy_training_free"]), *points, strict=True),
            "o-",
            color=colors[name],
            label=LABELS[name],
        )
    left.set(xlabel="training step", ylabel="held-out accuracy, %", ylim=(0, 103))
    left.legend(frameon=False, loc="lower right")
    shown = ["matched", "mismatched", "zero", "noise", "training_free"][::-1]
    exact = summaries["exact"]
    values = [100 * exact["accuracy" if v == "matched" else f"accuracy_{v}"] for v in shown]
    bars = right.barh(
        [VARIANTS[v] for v in shown], values, color=["#1f6feb" if v == "matched" else "#afb8c1" for v in shown]
    )
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.set(xlabel="held-out accuracy, %", xlim=(0, 112))
    figure.savefig(RESULTS / "relay.png", dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--render-only", action="store_true", help="only draw and rewrite README from the kept results")
    args, flags = parser.parse_known_args()
    if not args.render_only:
        run(flags)
    summaries = {name: json.loads((RESULTS / name / SUMMARY_FILE).read_text()) for name in RUNS}
    plot(summaries)
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    (ROOT / "README.md").write_text(f"{before}{BEGIN}\n{table(summaries)}\n{END}{after}")
    print(table(summaries))


if __name__ == "__main__":
    main()
