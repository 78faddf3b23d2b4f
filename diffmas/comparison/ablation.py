"""One ablation from its settings to its report: what `python -m diffmas.ablate` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffmas.command_line import as_flags, integers
from diffmas.comparison.ablation_report import print_ablation, write_ablation_report
from diffmas.comparison.axes import AXES, point, values_of
from diffmas.comparison.comparison import Comparison, Options, Settings, run_to_end
from diffmas.support.folders import check_output
from diffmas.support.launch import check_alone


@dataclass
class AblateArguments:
    """Axes take one value, or several separated by commas; other flags are those of diffmas.train."""

    run: str = field(metadata={"help": "Folder for trainings, answers and the report; made where there is none."})
    latent_steps: str | None = field(default=None, metadata={"help": "Latent steps m, e.g. 0,2,4,8."})
    agents: str | None = field(default=None, metadata={"help": "Agents kept: the first ones and the last, e.g. 1,2,4."})
    lora_r: str | None = field(default=None, metadata={"help": "Ranks of the adapter."})
    detach_trace: str | None = field(default=None, metadata={"help": "false,true."})
    handover: str | None = field(default=None, metadata={"help": "full,latent,bridge."})
    handover_sink: str | None = field(default=None, metadata={"help": "0,1,auto."})
    adapters: str | None = field(default=None, metadata={"help": "shared,per_role."})
    alignment: str | None = field(default=None, metadata={"help": "identity,ridge,learned,soft."})
    seeds: str = field(default="0", metadata={"help": "Seeds of training and sampling."})
    samples: int = field(default=1, metadata={"help": "Answers an item."})
    batch_size: int = field(default=64, metadata={"help": "Rows decoded together."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})


def ablate(args: AblateArguments, flags: Sequence[str], prog: str) -> int:
    """Train and evaluate what is missing, print a table, write the report. Returns the process's exit status.

    Args:
        flags: those of `diffmas.train`, for every value.
        prog: the program that complains of them.

    Raises:
        ValueError: no axis to sweep, or a value it does not have.
    """
    check_alone("an ablation")
    check_output(args.run, "run")
    for flag, instead in (("--seed", "--seeds"), ("--output_dir", "--run")):
        if any(word.split("=")[0] == flag for word in flags):
            raise ValueError(f"{flag} is given; allowed: {instead}")
    given = {axis: values_of(axis, text) for axis in AXES if (text := getattr(args, axis)) is not None}
    swept = {axis: values for axis, values in given.items() if len(values) > 1}
    if not swept:
        raise ValueError(f"no axis has several values; allowed: e.g. --latent_steps 0,2,4 ({', '.join(AXES)})")
    flags = [*flags, *as_flags({a: v[0] for a, v in given.items() if a not in swept and a != "agents"})]
    settings = Settings(flags, prog)
    count = given["agents"][0] if "agents" in given and "agents" not in swept else len(settings.topology.agents)
    methods = [point(axis, value, count, settings.topology) for axis, values in swept.items() for value in values]
    task = settings.task.task
    comparison = Comparison(
        args.run, {task: flags}, methods, integers("seeds", args.seeds), ("matched", "mismatched"),
        Options(args.samples, args.batch_size), prog=prog, show_progress=not args.disable_tqdm,
    )  # fmt: skip
    if (summary := run_to_end(comparison)) is None:
        return 130
    print_ablation(summary, task, swept)
    print(f"report: {write_ablation_report(args.run, summary, task, swept)}")
    return 0
