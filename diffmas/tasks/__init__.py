"""What agents are trained and evaluated on: items, role prompts, and when an answer counts as right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffmas.prompts import Prompts
from diffmas.tasks import gsm8k, jsonl, relay

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Items have an `answer`, which training teaches to write; `check(prediction, gold)` decides on a prediction.

    An item's `gold`, where it has one, is what a prediction is checked against; otherwise its `answer`.
    """

    name: str
    train: Sequence[Item]
    eval: Sequence[Item]
    prompts: Prompts
    check: Callable[[str, str], bool]


@dataclass
class TaskArguments:
    """What to train and evaluate on."""

    task: str = field(default="relay", metadata={"help": "relay, gsm8k, or the path of a .jsonl file."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with train.jsonl and test.jsonl to read instead of the hub."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "JSONL file to evaluate on; default: the last items of the task's own file."}
    )
    fields: str = field(
        default="question,answer", metadata={"help": "JSONL fields that hold the question and the answer."}
    )
    prompts: str | None = field(
        default=None, metadata={"help": "YAML file of role prompts, or a built-in family; default: the task's own."}
    )
    train_size: int | None = field(default=None, metadata={"help": "Train on the first so many items only."})
    eval_size: int | None = field(default=None, metadata={"help": "Evaluate on the first so many items only."})
    slots: int = field(default=8, metadata={"help": "relay: slots in the evidence."})
    values: int = field(default=16, metadata={"help": "relay: values a slot can take."})
    task_seed: int = field(default=0, metadata={"help": "relay: which items are drawn."})


def load_task(args: TaskArguments) -> Task:
    """The task that `args` describes.

    Raises:
        ValueError: an unknown task, an item without question or answer, no item at all, a size below 1.
        FileNotFoundError: a data, prompt or evaluation file that does not exist.
    """
    for name in ("train_size", "eval_size"):
        if (size := getattr(args, name)) is not None and size < 1:
            raise ValueError(f"{name} is {size}; allowed: integers ≥ 1")
    if args.task == "relay":
        train, evaluation = (
            relay.Relay(split, size=size, slots=args.slots, values=args.values, seed=args.task_seed)
            for split, size in (("train", args.train_size or 131_072), ("eval", args.eval_size or 1024))
        )
        family, check = Path(relay.__file__).with_suffix(".yaml"), relay.check
    elif args.task == "gsm8k":
        train, evaluation = gsm8k.load(args.data_dir)
        family, check = "reasoning", gsm8k.check
    elif args.task.endswith(".jsonl"):
        train, evaluation = jsonl.load(args.task, args.eval_file, args.fields, args.eval_size)
        family, check = "reasoning", gsm8k.check
    else:
        raise ValueError(f"task is {args.task!r}; allowed: relay, gsm8k, or the path of a .jsonl file")
    if args.task != "relay":
        train, evaluation = train[: args.train_size], evaluation[: args.eval_size]
    return Task(Path(args.task).stem, train, evaluation, Prompts.load(args.prompts or family), check)
