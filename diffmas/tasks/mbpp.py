"""MBPP+: short Python functions with EvalPlus' tests (evalplus/mbppplus).

It trains on MBPP's training split (google-research-datasets/mbpp, full) without the problems that are also in MBPP+.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Sequence

from diffmas.answers import code
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

TRAIN = Source("google-research-datasets/mbpp", "train", ("train",), ("full",))
TEST = Source("evalplus/mbppplus", "test", ("MbppPlus", "test"))


def load(args: TaskArguments) -> Task:
    """Items with `question`, `answer` (a fenced program), `test` and `entry_point`."""
    return build(
        "mbpp+", args, train=TRAIN, evaluation=TEST, make=item, make_train=train_item, keep=_not_held_out, kind=code,
        prompts="code", ready=code.ready,
    )  # fmt: skip


def item(row: Row) -> Item:
    return _item(row, str(take(row, "prompt")), str(take(row, "test")))


def train_item(row: Row) -> Item:
    tests = [str(row.get("test_setup_code") or ""), *take(row, "test_list")]
    return _item(row, str(take(row, "text", "prompt")), "\n".join(tests))


def _item(row: Row, text: str, test: str) -> Item:
    shown = list(row.get("test_list") or ())[:3]
    examples = "\nYour program has to pass these tests:\n" + "\n".join(shown) if shown else ""
    solution = str(take(row, "code")).strip()
    # The prompt of MBPP+ ends on a test of its own, between quotes.
    question = text.strip().strip('"').split("\nassert ")[0].strip() + examples
    return {
        **row,
        "question": question,
        "answer": f"```python\n{solution}\n```",
        "gold": solution,
        "entry_point": called(shown),
        "test": test,
    }


def called(tests: Sequence[str]) -> str | None:
    """The function that the first test calls, other than those of Python."""
    for node in ast.walk(ast.parse(tests[0])) if tests else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not hasattr(builtins, node.func.id):
            return node.func.id
    return None


def _not_held_out(row: Row, held_out: Sequence[Item]) -> bool:
    return str(row.get("task_id")) not in {str(other.get("task_id")) for other in held_out}
