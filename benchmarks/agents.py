"""`python -m benchmarks.agents`: agents that differ, from several seeds: models by role, and adapters by role.

Runs `python -m diffmas.train` with a team of two embedded bases, and on one base with an adapter of all agents or one
each. Killed and started again, it goes on where it was (`--folder`). Keeps summaries and metrics under
`benchmarks/results/agents/` and puts the tables into docs/agents.md.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import trainings
from benchmarks.relay import ROOT
from benchmarks.trainings import Summary, Training, mean, percent
from diffmas.runs.files import METRICS_FILE

RESULTS, PAGE = trainings.RESULTS / "agents", ROOT / "docs" / "agents.md"
TASK = "relay"
SHARED = {"save_strategy": "no"}


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Args:
        table: the mark in the page that it stands between.
        label: what it is called there. options: flags by name.
    """

    table: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)


ARMS = {
    "two_models": Arm("models", "`--topology two_models`", {"topology": "two_models"}, (42, 0, 1, 2, 3, 4, 5, 6, 7, 8)),
    "shared": Arm("adapters", "one adapter of both", {"adapters": "shared"}),
    "per_role": Arm("adapters", "`--adapters per_role`", {"adapters": "per_role"}),
}


def table(arms: Mapping[str, list[Summary]], early: Mapping[str, list[float]]) -> str:
    """Accuracies by arm, with controls; `early`: accuracies after the first evaluation of a training, by arm."""
    lines = [
        "| | seeds | lowest | mean | another row's, highest | zero | noise | untrained | "
        "after the first evaluation, by seed | updates | seconds |",
        "|---|" + "---:|" * 10,
    ]
    for name, summaries in arms.items():
        own, other = percent(summaries), percent(summaries, "mismatched")
        controls = " | ".join(mean(percent(summaries, control)) for control in ("zero", "noise", "training_free"))
        lines.append(
            f"| {ARMS[name].label} | {len(own)} | {min(own):.1f} | {statistics.mean(own):.1f} | {max(other):.1f} | "
            f"{controls} | {', '.join(f'{value:.0f}' for value in early[name])} | {summaries[0]['steps']} | "
            f"{mean([s['seconds'] for s in summaries])} |"
        )
    every = [summary for summaries in arms.values() for summary in summaries]
    seeds = "; ".join(
        f"{ARMS[name].label}: {', '.join(str(s['training']['seed']) for s in summaries)}"
        for name, summaries in arms.items()
    )
    return "\n".join(lines) + (
        f"\n\nAccuracy in percent on {every[0]['eval_items']} held-out items; seconds of the whole command, mean. "
        f"Seeds of {seeds}. {trainings.machines(every)}. Made by `python -m benchmarks.agents`."
    )


def first_accuracies(folder: Path, summaries: Iterable[Summary]) -> list[float]:
    """In percent, of the first evaluation during each training."""
    found = []
    for summary in summaries:
        path = folder / f"seed-{summary['training']['seed']}" / METRICS_FILE
        entries = map(json.loads, path.read_text().splitlines())
        found.append(next(100 * entry["eval_accuracy"] for entry in entries if "eval_accuracy" in entry))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = trainings.parser_of("agents", __doc__)
    parser.add_argument("--arms", default=",".join(ARMS), help="with commas between; default: all")
    parser.add_argument("--seeds", type=int, help="how many of each arm's; default: all")
    args = parser.parse_args(argv)
    arms = trainings.chosen(parser, "arms", args.arms, ARMS)
    folder = args.folder.resolve()
    kept = folder / "kept" if args.no_results else RESULTS
    if not args.render_only:
        cells = [(arm, seed) for arm in arms for seed in ARMS[arm].seeds[: args.seeds]]
        trainings.run((Training(arm, TASK, seed, SHARED | {**ARMS[arm].options}) for arm, seed in cells), folder, kept)
    if args.no_results:
        return
    if not (found := {arm: s for (_, arm), s in trainings.found(kept, ARMS, [TASK]).items()}):
        raise SystemExit(f"{kept} holds no training that has finished")
    for mark in dict.fromkeys(ARMS[arm].table for arm in found):
        rows = {arm: summaries for arm, summaries in found.items() if ARMS[arm].table == mark}
        early = {arm: first_accuracies(kept / arm / TASK, summaries) for arm, summaries in rows.items()}
        trainings.put(PAGE, mark, text := table(rows, early))
        print(text)


if __name__ == "__main__":
    main()
