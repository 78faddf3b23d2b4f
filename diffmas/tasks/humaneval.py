"""HumanEval+ (evalplus/humanevalplus) and HumanEval (openai/openai_humaneval): functions from their docstrings.

Neither has a training set: both train on MBPP's training split (as the task `mbpp+` does).
"""

from __future__ import annotations

from diffmas.answers import code
from diffmas.tasks import mbpp
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

PLUS = Source("evalplus/humanevalplus", "test", ("HumanEvalPlus", "test"))
ORIGINAL = Source("openai/openai_humaneval", "test", ("HumanEval", "test"))


def load_plus(args: TaskArguments) -> Task:
    """HumanEval with EvalPlus' tests."""
    return _load("humaneval+", PLUS, args)


def load(args: TaskArguments) -> Task:
    """HumanEval with its own tests."""
    return _load("humaneval", ORIGINAL, args)


def _load(name: str, source: Source, args: TaskArguments) -> Task:
    return build(
        name, args, train=mbpp.TRAIN, evaluation=source, make=item, make_train=mbpp.train_item, kind=code,
        prompts="code", ready=code.ready,
    )  # fmt: skip


def item(row: Row) -> Item:
    """`context` is the prompt: an answer may rely on its imports and helpers without repeating them."""
    prompt, entry_point = str(take(row, "prompt")), str(take(row, "entry_point"))
    solution = prompt + str(take(row, "canonical_solution"))
    return {
        **row,
        "question": f"Complete this Python function:\n```python\n{prompt.strip()}\n```",
        "answer": f"```python\n{solution.strip()}\n```",
        "gold": solution,
        "entry_point": entry_point,
        "context": prompt,
        "test": f"{take(row, 'test')}\n\ncheck({entry_point})\n",
    }
