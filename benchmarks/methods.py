"""`python -m benchmarks.methods`: all methods on relay and two reasoning-gym tasks, three seeds, with controls.

Pre-trains the embedded base a little further, so that the two tasks are within its reach, then trains and evaluates
every method. Killed and started again, it goes on where it was (`--folder`). Keeps summary, plot and table under
`benchmarks/results/methods/` and puts the table into docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.compared import Study, parser_of, run, sizes
from diffmas.comparison.comparison import Options
from diffmas.embedded import EMBEDDED_PATH
from diffmas.embedded.pretrain import conversation, pretrain
from diffmas.embedded.tokenizer import ASSISTANT, END, USER
from diffmas.support.atomic import write_atomically
from diffmas.tasks import TaskArguments, load_task

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
    "latent_steps": 8, "lora_r": 32, "lora_alpha": 64, "learning_rate": 3e-3, "lr_scheduler_type": "cosine",
    "warmup_steps": 10, "gradient_accumulation_steps": 1, "checkpointing": "none", "temperature": 0.6, "top_p": 0.95,
    "max_new_tokens": 6, "save_steps": 50, "save_total_limit": 1, "logging_steps": 20,
}  # fmt: skip


def task_flags(folder: Path, steps: float, items: int) -> dict[str, list[str]]:
    """The flags of `diffmas.train` by task; `steps` scales the number of training steps."""
    for name, text in (("relay_team.yaml", RELAY_TEAM), ("team.yaml", TEAM), ("prompts.yaml", PROMPTS)):
        write_atomically(folder / name, text)
    own = {
        "relay": {
            "task": "relay:slots=4", "topology": folder / "relay_team.yaml", "max_steps": int(300 * steps),
            "per_device_train_batch_size": 128,
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


def _said(summary: dict[str, Any]) -> tuple[str, str]:
    first = summary["cells"][0]
    return "", (
        f"{sizes(summary)}, {first['samples']} samples each, temperature 0.6, top-p 0.95; in brackets 95 % bootstrap "
        "intervals, paired where they are differences. The base is the embedded one, pre-trained further on the "
        "training questions."
    )


STUDY = Study(
    name="methods",
    tasks=("relay", *RG),
    seeds=3,
    items=200,
    controls=("matched", "mismatched", "zero", "noise"),
    options=Options(samples=4, batch_size=64, max_message_tokens=24),
    said=_said,
)


def _flags(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    make_base(folder / "base", int(480 * args.steps))
    return task_flags(folder, args.steps, args.items)


def main(argv: list[str] | None = None) -> None:
    run(STUDY, parser_of(STUDY, __doc__), _flags, argv)


if __name__ == "__main__":
    main()
