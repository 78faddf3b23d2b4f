"""`python -m benchmarks.seeds`: the default training from many seeds, beside a smaller one of as long.

Runs `python -m diffmas.train` on the embedded base from every seed, and with half the latent steps and LoRA of rank 8.
Killed and started again, it goes on where it was (`--folder`). Keeps summaries and metrics under
`benchmarks/results/seeds/` and puts the table into docs/channel.md.
"""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import trainings
from benchmarks.channel import PAGE
from benchmarks.trainings import Summary, Training, mean, percent

RESULTS = trainings.RESULTS / "seeds"
TASK = "relay"
SHARED = {"max_message_tokens": 8, "save_strategy": "no"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "smaller": (
        "4 latent steps, LoRA of rank 8, 300 updates",
        {"latent_steps": 4, "lora_r": 8, "lora_alpha": 16, "max_steps": 300},
    ),
}


def table(by_cell: dict[tuple[str, str], list[Summary]]) -> str:
    """Accuracies and seconds as a Markdown table."""
    lines = [
        "| `python -m diffmas.train` | seeds | lowest | mean | seeds below 95 % | another row's, highest | seconds |",
        "|---|" + "---:|" * 6,
    ]
    for (_, arm), summaries in by_cell.items():
        own, other = percent(summaries), percent(summaries, "mismatched")
        lines.append(
            f"| {ARMS[arm][0]} | {len(own)} | {min(own):.1f} | {statistics.mean(own):.1f} | "
            f"{sum(value < 95 for value in own)} | {max(other):.1f} | {mean([s['seconds'] for s in summaries])} |"
        )
    every = [summary for summaries in by_cell.values() for summary in summaries]
    return "\n".join(lines) + (
        f"\n\nAccuracy in percent on {every[0]['eval_items']} held-out items; seconds of the whole command, mean. "
        f"{trainings.machines(every)}. Made by `python -m benchmarks.seeds`."
    )


def main(argv: list[str] | None = None) -> None:
    parser = trainings.parser_of("seeds", __doc__)
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas between; default: all")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    args = parser.parse_args(argv)
    arms = trainings.chosen(parser, "arms", args.arms, ARMS)
    folder = args.folder.resolve()
    kept = folder / "kept" if args.no_results else RESULTS
    if not args.render_only:
        cells = [(arm, seed) for seed in range(args.seeds) for arm in arms]
        trainings.run((Training(arm, TASK, seed, SHARED | ARMS[arm][1]) for arm, seed in cells), folder, kept)
    if args.no_results:
        return
    if not (by_cell := trainings.found(kept, ARMS, [TASK])):
        raise SystemExit(f"{kept} holds no training that has finished")
    trainings.put(PAGE, "seeds", table(by_cell))
    print(table(by_cell))


if __name__ == "__main__":
    main()
