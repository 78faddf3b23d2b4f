"""What agents are trained and evaluated on: items, role prompts, and when an answer counts as right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from diffmas.tasks import gsm8k, jsonl, relay
from diffmas.tasks.base import Item, Task, TaskArguments, gold

__all__ = ["LOADERS", "Item", "Task", "TaskArguments", "gold", "load_task"]

#: Built-in tasks by name.
LOADERS: dict[str, Callable[[TaskArguments], Task]] = {"relay": relay.load, "gsm8k": gsm8k.load}


def load_task(args: TaskArguments) -> Task:
    """The task that `args` describes.

    Raises:
        ValueError: an unknown task, an item without question or answer, no item at all, a size below 1.
        FileNotFoundError: a data, prompt or evaluation file that does not exist.
        ModuleNotFoundError: a package the task needs is not installed.
    """
    for name in ("train_size", "eval_size"):
        if (size := getattr(args, name)) is not None and size < 1:
            raise ValueError(f"{name} is {size}; allowed: integers ≥ 1")
    load = jsonl.load if args.task.endswith(".jsonl") else LOADERS.get(args.task)
    if load is None:
        raise ValueError(f"task is {args.task!r}; allowed: {', '.join(LOADERS)}, or the path of a .jsonl file")
    task = load(args)
    return replace(task, train=_first(task.train, args.train_size), eval=_first(task.eval, args.eval_size))


def _first(items: Sequence[Item], size: int | None) -> Sequence[Item]:
    return items if size is None or len(items) <= size else items[:size]
