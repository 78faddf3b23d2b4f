"""`python -m benchmarks.capacity`: how much a message holds: slots against latent steps, on the embedded base.

Trains the relay for every number of slots and latent steps, and once with full hand-over; beside each accuracy, that of
latent steps without training and of text messages of as many tokens. Killed and started again, it goes on where it was
(`--folder`). Keeps summaries under `benchmarks/results/capacity/` and puts table and plot into docs/channel.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import trainings
from benchmarks.channel import PAGE
from benchmarks.trainings import Summary, Training, mean, percent

RESULTS = trainings.RESULTS / "capacity"
SLOTS, STEPS = (2, 4, 8, 16), (1, 2, 4, 8, 16)
SHARED: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no"}
TASKS = {f"slots-{slots}": slots for slots in SLOTS}
ARMS: dict[str, dict[str, Any]] = {
    **{f"m-{m}": {"latent_steps": m, "handover": "latent", "max_message_tokens": m} for m in STEPS},
    "full": {"latent_steps": 4, "handover": "full", "max_message_tokens": 4},
}
#: Of a right guess among 16 values.
CHANCE = 100 / 16


def training(arm: str, task: str, seed: int) -> Training:
    return Training(arm, task, seed, SHARED | {"task": f"relay:slots={TASKS[task]}"} | ARMS[arm])


def known(accuracy: float, slots: int) -> float:
    """How many of `slots` values a solver knows that is right so often (in percent) and guesses the rest."""
    return max(accuracy - CHANCE, 0) / (100 - CHANCE) * slots


def table(by_cell: dict[tuple[str, str], list[Summary]]) -> str:
    """Accuracy by slots and latent steps as a Markdown table."""
    names = [name for name in ARMS if any(arm == name for _, arm in by_cell)]
    lines = [
        "| slots | " + " | ".join("full, m = 4" if n == "full" else n.replace("m-", "m = ") for n in names) + " |",
        "|---:|" + "---:|" * len(names),
    ]
    for task, slots in TASKS.items():
        cells = []
        for arm in names:
            summaries = by_cell.get((task, arm), [])
            own, untrained, text = (mean(percent(summaries, name)) for name in ("", "training_free", "text"))
            cells.append(f"{own} ({untrained}, {text})" if summaries else "")
        if any(cells):
            lines.append(f"| {slots} | " + " | ".join(cells) + " |")
    every = [summary for summaries in by_cell.values() for summary in summaries]
    return "\n".join(lines) + (
        f"\n\nAccuracy in percent on {every[0]['eval_items']} held-out items: trained (untrained, text messages of at "
        f"most m tokens); a guess is right in {CHANCE:.0f} %. {every[0]['steps']} updates each. "
        f"{trainings.machines(every)}. Made by `python -m benchmarks.capacity`.\n\n![Values known by the solver, "
        "against latent steps](../benchmarks/results/capacity/capacity.png)"
    )


def plot(by_cell: dict[tuple[str, str], list[Summary]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for task, slots in TASKS.items():
        points = [
            (m, known(value, slots))
            for m in STEPS
            for value in percent(by_cell.get((task, f"m-{m}"), []))
        ]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=f"{slots} slots")
    axes.set(xlabel="latent steps", ylabel="values that the solver knows", xscale="log", xticks=STEPS)
    axes.set_xticklabels(STEPS)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)


def main(argv: list[str] | None = None) -> None:
    parser = trainings.parser_of("capacity", __doc__)
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas between; default: all")
    parser.add_argument("--tasks", default=",".join(TASKS), help="with commas between; default: all")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    args = parser.parse_args(argv)
    arms = trainings.chosen(parser, "arms", args.arms, ARMS)
    tasks = trainings.chosen(parser, "tasks", args.tasks, TASKS)
    folder = args.folder.resolve()
    kept = folder / "kept" if args.no_results else RESULTS
    if not args.render_only:
        cells = [(arm, task, seed) for seed in range(args.seeds) for task in tasks for arm in arms]
        trainings.run((training(*cell) for cell in cells), folder, kept)
    if args.no_results:
        return
    if not (by_cell := trainings.found(kept, ARMS, TASKS)):
        raise SystemExit(f"{kept} holds no training that has finished")
    plot(by_cell, kept / "capacity.png")
    trainings.put(PAGE, "capacity-toy", table(by_cell))
    print(table(by_cell))


if __name__ == "__main__":
    main()
