"""What agents are trained and evaluated on: items, role prompts, and when an answer counts as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from diffmas.prompts import Prompts, template_fields
from diffmas.prompts.chat_template import parse_kwargs
from diffmas.prompts.dates import parse_date
from diffmas.prompts.shortened import ShortenedPrompts
from diffmas.tasks import (
    aime,
    arc,
    commonsenseqa,
    divided,
    facts,
    gpqa,
    gsm8k,
    humaneval,
    jsonl,
    math,
    mbpp,
    medqa,
    openbookqa,
    procedural,
    relay,
    tally,
    two_hop,
)
from diffmas.tasks.base import JSONL, Item, Task, TaskArguments, gold

__all__ = ["LOADERS", "Item", "Task", "TaskArguments", "as_asked", "as_kept", "gold", "load_task"]

#: Built-in tasks whose items are drawn, by name; they have options and read no files.
DRAWN: dict[str, Callable[[TaskArguments], Task]] = {
    "relay": relay.load,
    "facts": facts.load,
    "two_hop": two_hop.load,
    "tally": tally.load,
}
#: Built-in tasks by name.
LOADERS: dict[str, Callable[[TaskArguments], Task]] = {
    **DRAWN,
    "svamp": divided.load_svamp,
    "gsm8k": gsm8k.load,
    "gsm8k:split": divided.load_gsm8k,
    "math": math.load,
    "aime24": aime.load24,
    "aime25": aime.load25,
    "gpqa": gpqa.load,
    "arc_easy": arc.load_easy,
    "arc_challenge": arc.load_challenge,
    "openbookqa": openbookqa.load,
    "commonsenseqa": commonsenseqa.load,
    "medqa": medqa.load,
    "humaneval": humaneval.load,
    "humaneval+": humaneval.load_plus,
    "mbpp+": mbpp.load,
}


def load_task(args: TaskArguments) -> Task:
    """The task that `args` describes. Items to train on may be read only when they are first looked at.

    Raises:
        ValueError: an unknown task, an item without question or answer, no item at all, a size below 1, a `date` that
            is none, an `eval_file` or `checker` for a task that is no file, a `data_dir` for one that reads none.
        FileNotFoundError: a data, prompt or evaluation file that does not exist.
        ModuleNotFoundError: a package the task needs is not installed.
    """
    for name in ("train_size", "eval_size", "max_prompt_tokens"):
        if (size := getattr(args, name)) is not None and size < 1:
            raise ValueError(f"{name} is {size}; allowed: integers ≥ 1")
    if args.date is not None:
        parse_date(args.date)
    load = _loader(args.task)
    if args.eval_file is not None and load is not jsonl.load:
        raise ValueError(
            f"eval_file is {args.eval_file!r} with task {args.task!r}; allowed: where task is a .jsonl file"
        )
    if args.checker is not None and load is not jsonl.load:
        raise ValueError(f"checker is {args.checker!r} with task {args.task!r}; allowed: where task is a .jsonl file")
    if args.data_dir is not None and load in (*DRAWN.values(), procedural.load, jsonl.load):
        raise ValueError(
            f"data_dir is {args.data_dir!r} with task {args.task!r}, which reads none; allowed: with "
            f"{', '.join(name for name in LOADERS if name not in DRAWN)}"
        )
    task = load(args)
    task = replace(task, prompts=as_asked(task.prompts, args))
    if args.eval_size is None or len(task.eval) <= args.eval_size:
        return task
    return replace(task, eval=task.eval[: args.eval_size])


def as_asked(prompts: Prompts, args: TaskArguments) -> Prompts:
    """The prompts with the date, system prompt, template options and longest length that `args` ask for."""
    if args.system_prompt is not None:
        template_fields({"user": args.system_prompt}, "system_prompt")
    options = parse_kwargs(args.chat_template_kwargs)
    prompts = replace(prompts, date=args.date, system=args.system_prompt, chat_template_kwargs=options)
    return prompts if args.max_prompt_tokens is None else ShortenedPrompts.of(prompts, args.max_prompt_tokens)


def as_kept(args: TaskArguments, prompts: Prompts) -> TaskArguments:
    """Arguments that ask for what `prompts` say beside their roles, which were perhaps made in Python."""
    kwargs = dict(prompts.chat_template_kwargs) or None
    return replace(args, date=prompts.date, system_prompt=prompts.system, chat_template_kwargs=kwargs)


def _loader(task: str) -> Callable[[TaskArguments], Task]:
    if task.startswith(procedural.PREFIX):
        return procedural.load
    if task.endswith(JSONL):
        return jsonl.load
    if (drawn := task.partition(":")[0]) in DRAWN:
        return DRAWN[drawn]
    if task not in LOADERS:
        raise ValueError(f"task is {task!r}; allowed: {', '.join(LOADERS)}, rg:name, or the path of a .jsonl file")
    return LOADERS[task]
