"""What a task is, and the arguments that describe one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from diffmas.prompts import Prompts
from diffmas.prompts.chat_template import parse_kwargs

#: Built-in tasks, as the command line lists them.
NAMES = (
    "relay", "facts", "two_hop", "tally", "svamp", "gsm8k", "gsm8k:split", "math", "aime24", "aime25", "gpqa",
    "arc_easy", "arc_challenge", "openbookqa", "commonsenseqa", "medqa", "humaneval", "humaneval+", "mbpp+",
)  # fmt: skip

#: How answers of a task that is a file are checked.
CHECKERS = ("mathematics", "choice", "exact", "text", "code")

#: What a system that was made in Python keeps as its task.
IN_PYTHON = "in Python"
#: How the path of a task that is a file ends.
JSONL = (".jsonl", ".jsonl.gz")

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Items, role prompts, and when a prediction counts as right.

    Args:
        train, eval: items; an item's `answer` is what training teaches to write, its `gold`, where it has one, what
            tables show as the right answer (otherwise its `answer`).
        check: whether a prediction (the whole generated text) answers the item. A prediction that cannot be read is
            wrong; it never raises for what a model wrote. May be called from several threads.
        extract: the final answer of a prediction in a normal form, so that equal answers are equal strings (for
            counting agreeing samples); None where there is none.
        checker: name of what `check` is, where a task that is a file has chosen it or was given it.
        ready: raises where this machine cannot check predictions; to be asked before any are generated.
    """

    name: str
    train: Sequence[Item]
    eval: Sequence[Item]
    prompts: Prompts
    check: Callable[[str, Item], bool]
    extract: Callable[[str], str | None]
    ready: Callable[[], None] = lambda: None
    checker: str | None = None


def gold(item: Item) -> str:
    """The right answer of an item, as tables show it."""
    return str(item.get("gold", item["answer"]))


def parse_options(task: str) -> tuple[str, dict[str, Any]]:
    """A task's name and its options, from `name:option=value:…` (between colons or commas).

    Raises:
        ValueError: an option without a value, or with one that is no YAML.
    """
    name, *settings = re.split("[:,]", task)
    options = {}
    for setting in settings:
        key, mark, value = setting.partition("=")
        if not mark or not key.strip().isidentifier() or key.strip() in options:
            raise ValueError(f"task is {task!r}; allowed: name, or name:option=value:… with every option once")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"task is {task!r}: option {key.strip()} is {value!r}; allowed: a YAML value") from None
    return name.strip(), options


@dataclass
class TaskArguments:
    """What to train and evaluate on."""

    task: str = field(
        default="relay",
        metadata={
            "help": f"{', '.join(NAMES)}, rg:name (a data set of reasoning-gym), or the path of a .jsonl file; "
            "relay:slots=8:values=16, facts:n=8 and rg:name:option=value set options."
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with train and test files (.jsonl, .jsonl.gz, .csv, .parquet) to read instead of the hub's."
        },
    )
    eval_file: str | None = field(
        default=None,
        metadata={"help": "JSONL file to evaluate on, where the task is one; default: its own last items."},
    )
    fields: str = field(
        default="question,answer", metadata={"help": "JSONL fields that hold the question and the answer."}
    )
    checker: str | None = field(
        default=None,
        metadata={
            "help": f"When an answer to an item of a .jsonl file is right: {', '.join(CHECKERS)}, or module:function, "
            "called with text and item; default: chosen from the right answers."
        },
    )
    prompts: str | None = field(
        default=None, metadata={"help": "YAML file of role prompts, or a built-in family; default: the task's own."}
    )
    date: str | None = field(
        default=None,
        metadata={"help": "What a chat template takes for today, e.g. 2026-01-31; default: the day a run was begun."},
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "System prompt of every agent whose own prompt has none; an empty one suppresses a chat "
                  "template's own."},
    )  # fmt: skip
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": 'What the chat template is told, as JSON, e.g. {"enable_thinking": false}.'},
    )
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt of an agent: the longest text filled into it is cut at its end; default: no limit."
        },
    )
    train_size: int | None = field(default=None, metadata={"help": "Train on the first so many items only."})
    eval_size: int | None = field(default=None, metadata={"help": "Evaluate on the first so many items only."})
    task_seed: int = field(default=0, metadata={"help": "Tasks that are drawn: which items."})

    def __post_init__(self) -> None:
        if self.chat_template_kwargs is not None:
            # As a text, which a flag and a file can hold.
            self.chat_template_kwargs = json.dumps(parse_kwargs(self.chat_template_kwargs), sort_keys=True)

    @property
    def splits_one_file(self) -> bool:
        """Whether held-out items are the last of the file that is trained on, so that `eval_size` moves the border."""
        return self.task.endswith(JSONL) and self.eval_file is None
