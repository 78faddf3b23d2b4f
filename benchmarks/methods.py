"""`python -m benchmarks.methods`: all methods on relay and two reasoning-gym tasks, three seeds, with controls.

Pre-trains the embedded base a little further, so that the two tasks are within its reach, then trains and evaluates
every method. Killed and started again, it goes on where it was (`--folder`). Keeps summary, plot and table under
`benchmarks/results/methods/` and puts the table into docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.relay import ROOT
from diffmas.comparison.comparison import Comparison, Options
from diffmas.comparison.report import (
    by_name,
    draw_accuracies,
    markdown_table,
    names,
    print_comparison,
    write_comparison_report,
)
from diffmas.embedded import EMBEDDED_PATH
from diffmas.embedded.pretrain import conversation, pretrain
from diffmas.embedded.tokenizer import ASSISTANT, END, USER
from diffmas.evaluation.methods import choose_methods
from diffmas.support.atomic import write_atomically
from diffmas.support.machine import machine
from diffmas.tasks import TaskArguments, load_task

RESULTS = ROOT / "benchmarks" / "results" / "methods"
BEGIN, END_MARK = "<!-- methods: begin -->", "<!-- methods: end -->"
PAGE = ROOT / "docs" / "methods.md"

#: Two agents see the evidence, the solver only what they hand over.
RELAY_TEAM = """name: relay
handover: latent
agents:
  - {name: first, role: sender}
  - {name: second, role: sender, receives: [first]}
  - {name: solver, receives: [second]}
"""
#: Everybody sees the question.
TEAM = """name: sequential
handover: full
agents:
  - {name: planner}
  - {name: critic, receives: [planner]}
  - {name: solver, receives: [critic]}
"""
PROMPTS = """roles:
  default: {user: "{question}", text: "{messages}\\n{question}"}
"""
RG = {
    "rg:basic_arithmetic": "rg:basic_arithmetic,min_terms=2,max_terms=2,min_digits=1,max_digits=1,"
    "allow_parentheses=false,allow_negation=false",
    "rg:spell_backward": "rg:spell_backward,min_word_len=3,max_word_len=4",
}
#: Every value that matters is here: with a model given, the defaults are the paper's.
SHARED = {
    "latent_steps": 4, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 10,
    "gradient_accumulation_steps": 1, "checkpointing": "none", "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 6,
    "save_steps": 50, "save_total_limit": 1, "logging_steps": 20,
}  # fmt: skip
OPTIONS = Options(samples=4, batch_size=64, max_message_tokens=24)


def task_flags(folder: Path, steps: float, items: int) -> dict[str, list[str]]:
    """The flags of `diffmas.train` by task; `steps` scales the number of training steps."""
    for name, text in (("relay_team.yaml", RELAY_TEAM), ("team.yaml", TEAM), ("prompts.yaml", PROMPTS)):
        write_atomically(folder / name, text)
    own = {
        "relay": {
            "task": "relay:slots=4", "topology": folder / "relay_team.yaml", "max_steps": int(640 * steps),
            "per_device_train_batch_size": 64,
        }
    }  # fmt: skip
    for name, task in RG.items():
        own[name] = {
            "task": task, "prompts": folder / "prompts.yaml", "topology": folder / "team.yaml",
            "max_steps": int(100 * steps), "per_device_train_batch_size": 32,
        }  # fmt: skip
    values = SHARED | {"model": folder / "base", "eval_size": items}
    return {name: [f"--{k}={v}" for k, v in (values | changes).items()] for name, changes in own.items()}


def make_base(folder: Path, steps: int) -> None:
    """The embedded base, `steps` further, on its own corpus and on the two tasks' training questions."""
    if (folder / "pretraining.json").is_file():
        return
    torch.manual_seed(0)
    began = time.perf_counter()
    model, tokenizer = (kind.from_pretrained(EMBEDDED_PATH) for kind in (AutoModelForCausalLM, AutoTokenizer))
    train = [load_task(TaskArguments(task=task)).train for task in RG.values()]

    def draw(rng: random.Random) -> str:
        if rng.random() < 0.1:
            return conversation(rng)
        items = rng.choice(train)
        chosen = (items[rng.randrange(len(items))] for _ in range(6))
        return "".join(f"{USER}{item['question']}{ASSISTANT}{item['answer']}{END}" for item in chosen)

    state = pretrain(model, tokenizer, steps, 64, 3e-3, random.Random(0), draw)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    made = {"steps": steps, "seconds": round(time.perf_counter() - began), **state}
    write_atomically(folder / "pretraining.json", json.dumps(made, indent=2) + "\n")


def section(summary: dict) -> str:
    """What the page shows: accuracies, what the traces carry, where it comes from."""
    cells = by_name(summary)
    tasks, methods = names(summary)
    lines = [markdown_table(summary), "", "| matched − mismatched trace, points | " + " | ".join(tasks) + " |"]
    lines.append("|---|" + "---:|" * len(tasks))
    found = {(d["task"], d["a"]): d for d in summary["differences"] if d["b_control"] == "mismatched"}
    for method in methods:
        row = [found.get((task, method)) for task in tasks]
        if any(row):
            values = (
                "–" if d is None else f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"
                for d in row
            )
            lines.append(f"| `{method}` | " + " | ".join(values) + " |")
    sizes = ", ".join(f"{cells[task, methods[0], 'matched']['accuracy']['items']} of {task}" for task in tasks)
    first, of = summary["cells"][0], summary["machine"]
    lines += [
        "",
        f"Held-out items ({sizes}), {len(first['seeds'])} seeds, {first['samples']} samples each, temperature 0.6, "
        f"top-p 0.95; in brackets 95 % bootstrap intervals, paired where they are differences. The base is the "
        f"embedded one, pre-trained further on the training questions. {summary['minutes']} minutes; {of['device']}, "
        f"{of['threads']} threads, torch {of['torch']}, transformers {of['transformers']}. "
        "Made by `python -m benchmarks.methods`.",
    ]
    return "\n".join(lines)


def render(summary: dict) -> None:
    """Plot, table and page from a summary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = draw_accuracies(plt, (by_name(summary), *names(summary)))
        figure.savefig(RESULTS / "methods.png", dpi=140)
    table = section(summary)
    write_atomically(RESULTS / "methods.md", table + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    write_atomically(PAGE, f"{before}{BEGIN}\n{table}\n{END_MARK}{rest.split(END_MARK)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="runs/methods", help="where adapters and answers are kept between calls")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--items", type=int, default=200, help="held-out items a task")
    parser.add_argument("--steps", type=float, default=1.0, help="scale of all training steps, for a quick try")
    parser.add_argument("--methods", default="all", help="as for python -m diffmas.eval")
    parser.add_argument("--tasks", default=",".join(("relay", *RG)), help="any of the default's")
    parser.add_argument("--no-results", action="store_true", help="leave committed results and the page as they are")
    parser.add_argument("--render-only", action="store_true", help="only draw and rewrite the page from kept results")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.render_only:
        return render(json.loads((RESULTS / "summary.json").read_text()))
    folder, began = Path(args.folder), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    make_base(folder / "base", int(480 * args.steps))
    flags = task_flags(folder, args.steps, args.items)
    unknown = set(args.tasks.split(",")) - set(flags)
    if unknown:
        parser.error(f"tasks has {sorted(unknown)}; allowed: {', '.join(flags)}")
    flags = {name: flags[name] for name in args.tasks.split(",")}
    comparison = Comparison(
        folder, flags, choose_methods(args.methods), range(args.seeds), options=OPTIONS, show_progress=False,
        narrate=Console().print,
    )  # fmt: skip
    spent = folder / "seconds.json"
    earlier = json.loads(spent.read_text()) if spent.is_file() else 0.0

    try:
        summary = comparison.run()
    finally:
        seconds = earlier + time.perf_counter() - began
        write_atomically(spent, json.dumps(round(seconds, 1)) + "\n")
    summary = summary | {"minutes": round(seconds / 60, 1), "machine": machine()}
    summary["pretraining"] = json.loads((folder / "base" / "pretraining.json").read_text())
    print_comparison(summary)
    print(f"{summary['minutes']} minutes; report: {write_comparison_report(folder, summary)}")
    if not args.no_results:
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_atomically(RESULTS / "summary.json", json.dumps(summary, indent=1) + "\n")
        render(summary)


if __name__ == "__main__":
    main()
