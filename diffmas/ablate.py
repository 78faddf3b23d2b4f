"""`python -m diffmas.ablate --run DIR --latent_steps 0,2,4,8`: train and evaluate at every value, plot and tabulate.

Every axis given several values is swept by itself, all else as the flags of `diffmas.train` have it; an axis given one
value is such a flag. Killed and started again, it goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from diffmas.agents.topology import Topology
from diffmas.command_line import LESS_MEMORY, Parser, as_flags, integers
from diffmas.comparison.comparison import Comparison, Interrupted, Options, Settings
from diffmas.comparison.report import accuracy, by_name
from diffmas.evaluation.methods.base import ALL_CONTROLS, Method
from diffmas.models.alignment import ALIGNMENTS
from diffmas.support.atomic import write_atomically
from diffmas.support.failures import run_program
from diffmas.support.folders import check_output
from diffmas.support.interrupts import raise_on_interrupt
from diffmas.support.page import heading, note, page, panels, svg, table
from diffmas.training.launch import check_alone
from diffmas.training.report import REPORT_FILE

PROGRAM = "python -m diffmas.ablate"
#: What can be swept, and what a value is read as.
AXES = {
    "latent_steps": int, "agents": int, "lora_r": int, "detach_trace": bool, "handover": str, "alignment": str,
}  # fmt: skip


@dataclass
class AblateArguments:
    """Axes take one value, or several separated by commas; other flags are those of diffmas.train."""

    run: str = field(metadata={"help": "Folder for trainings, answers and the report; made where there is none."})
    latent_steps: str | None = field(default=None, metadata={"help": "Latent steps m, e.g. 0,2,4,8."})
    agents: str | None = field(default=None, metadata={"help": "Agents kept: the first ones and the last, e.g. 1,2,4."})
    lora_r: str | None = field(default=None, metadata={"help": "Ranks of the adapter."})
    detach_trace: str | None = field(default=None, metadata={"help": "false,true."})
    handover: str | None = field(default=None, metadata={"help": "full,latent."})
    alignment: str | None = field(default=None, metadata={"help": "identity,ridge,learned."})
    seeds: str = field(default="0", metadata={"help": "Seeds of training and sampling."})
    samples: int = field(default=1, metadata={"help": "Answers an item."})
    batch_size: int = field(default=64, metadata={"help": "Rows decoded together."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep, print a table, write summary and report. Returns the process's exit status."""
    raise_on_interrupt()
    parser = Parser(AblateArguments, prog=PROGRAM, description=__doc__)
    args, flags = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    return run_program(PROGRAM, lambda: _ablate(args, flags), lower=LESS_MEMORY)


def _ablate(args: AblateArguments, flags: list[str]) -> int:
    check_alone("an ablation")
    check_output(args.run, "run")
    for flag, instead in (("--seed", "--seeds"), ("--output_dir", "--run")):
        if any(word.split("=")[0] == flag for word in flags):
            raise ValueError(f"{flag} is given; allowed: {instead}")
    given = {axis: _values(axis, text) for axis in AXES if (text := getattr(args, axis)) is not None}
    swept = {axis: values for axis, values in given.items() if len(values) > 1}
    if not swept:
        raise ValueError(f"no axis has several values; allowed: e.g. --latent_steps 0,2,4 ({', '.join(AXES)})")
    flags = [*flags, *as_flags({a: v[0] for a, v in given.items() if a not in swept and a != "agents"})]
    settings = Settings(flags, PROGRAM)
    count = given["agents"][0] if "agents" in given and "agents" not in swept else len(settings.topology.agents)
    methods = [point(axis, value, count, settings.topology) for axis, values in swept.items() for value in values]
    task = settings.task.task
    comparison = Comparison(
        args.run, {task: flags}, methods, integers("seeds", args.seeds), ("matched", "mismatched"),
        Options(args.samples, args.batch_size), prog=PROGRAM, show_progress=not args.disable_tqdm,
    )  # fmt: skip
    try:
        summary = comparison.run()
    except (Interrupted, KeyboardInterrupt):
        print(f"stopped; the same command goes on where {args.run} ends")
        return 130
    rows = sweep_rows(summary, task, swept)
    shown = Table("", "accuracy, %", "another row's trace, %", title=task)
    for row in rows:
        shown.add_row(*row)
    Console(markup=False).print(shown)
    print(f"report: {write_ablation_report(args.run, summary, task, swept)}")
    return 0


def point(axis: str, value: Any, agents: int, topology: Topology) -> Method:
    """One value of a sweep as a method: the trained trace, with that one thing set differently.

    Raises:
        ValueError: a number of agents the topology does not have.
    """
    agents = value if axis == "agents" else agents
    shape = first_agents(topology, agents)
    if axis == "handover":
        shape = replace(shape, handover=value)
    settings = {} if axis == "agents" else {axis: value}
    controls = ALL_CONTROLS if agents > 1 else ("matched",)
    return Method(f"{axis}={value}", f"{axis} {value}", True, settings, lambda _: shape, controls=controls)


def first_agents(topology: Topology, count: int) -> Topology:
    """The first `count - 1` agents and the last; who received from an agent left out receives from its senders.

    Raises:
        ValueError: a number the topology does not have.
    """
    if not 1 <= count <= len(topology.agents):
        raise ValueError(f"agents is {count}; allowed: 1 to {len(topology.agents)}, the agents of {topology.name}")
    kept = [*topology.agents[: count - 1], topology.last]
    names = {agent.name for agent in kept}
    senders = {agent.name: agent.senders for agent in topology.agents}

    def reach(name: str) -> list[str]:
        return [name] if name in names else [kept for sender in senders[name] for kept in reach(sender)]

    agents = [
        replace(agent, senders=tuple(dict.fromkeys(s for name in agent.senders for s in reach(name)))) for agent in kept
    ]
    return Topology(topology.name, tuple(agents), topology.handover)


def sweep_rows(summary: dict[str, Any], task: str, swept: dict[str, list[Any]]) -> list[list[str]]:
    """Label, accuracy and accuracy with another row's trace of every value."""
    cells = by_name(summary)
    return [
        [f"{axis} {value}", *(accuracy(cells.get((task, f"{axis}={value}", c))) for c in ("matched", "mismatched"))]
        for axis, values in swept.items()
        for value in values
    ]


def write_ablation_report(folder: str | Path, summary: dict[str, Any], task: str, swept: dict[str, list[Any]]) -> Path:
    """A table and a plot an axis in `report.html`. Returns its path."""
    head = ["", "accuracy, %", "another row's trace, %"]
    body = [
        heading(f"{task}: one thing at a time", 1),
        svg(draw_sweeps, (by_name(summary), task, swept)),
        table(head, sweep_rows(summary, task, swept)),
        note(
            "Trained and evaluated at every value, all else equal; in brackets 95 % bootstrap intervals over items and "
            "the spread of the seeds."
        ),
        heading("Settings"),
        Markup("<pre class=small>{}</pre>").format(json.dumps(summary["settings"], indent=1)),
    ]
    path = Path(folder, REPORT_FILE)
    write_atomically(path, page(f"DiffMAS: ablation on {task}", body))
    return path


def draw_sweeps(plt, data):
    """Accuracy with its interval against the swept value, a panel an axis; grey: another row's trace."""
    cells, task, swept = data
    figure, shown = panels(plt, len(swept), 2.9, 3.2)
    for axes, (axis, values) in zip(shown, swept.items(), strict=True):
        # Between numbers there is something, between names nothing.
        line = "-" if AXES[axis] is int else ""
        for control, style, color, aside in (
            ("matched", f"o{line}", "#1f6feb", -0.06), ("mismatched", f"o{line * 2}", "#8c959f", 0.06),
        ):  # fmt: skip
            found = [(i, cells.get((task, f"{axis}={v}", control))) for i, v in enumerate(values)]
            found = [(i, cell["accuracy"]) for i, cell in found if cell is not None and cell["accuracy"]]
            if found:
                means = [100 * a["mean"] for _, a in found]
                low, high = ([100 * abs(a["mean"] - a[end]) for _, a in found] for end in ("low", "high"))
                label = "the row's own trace" if control == "matched" else "another row's"
                places = [i + aside for i, _ in found]
                axes.errorbar(places, means, [low, high], fmt=style, color=color, capsize=3, ms=5, label=label)
        axes.set_xticks(range(len(values)), [str(v) for v in values])
        axes.set(xlabel=axis.replace("_", " "), xlim=(-0.5, len(values) - 0.5), ylim=(-3, 103))
    for axes in shown[::3]:
        axes.set(ylabel="accuracy, %")
    handles, labels = shown[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _values(axis: str, text: str) -> list[Any]:
    parts, kind = [p.strip() for p in text.split(",")], AXES[axis]
    if len(set(parts)) < len(parts):
        raise ValueError(f"{axis} is {text!r}; allowed: different values")
    if kind is int:
        return integers(axis, text)
    if kind is bool:
        if not {p.lower() for p in parts} <= {"true", "false"}:
            raise ValueError(f"{axis} is {text!r}; allowed: true, false, or both")
        return [p.lower() == "true" for p in parts]
    if axis == "alignment" and (unknown := [p for p in parts if p not in ALIGNMENTS]):
        raise ValueError(f"alignment has {unknown}; allowed: {', '.join(ALIGNMENTS)}")
    return parts


if __name__ == "__main__":
    sys.exit(main())
