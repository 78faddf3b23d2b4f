"""Does a task's checker accept every reference answer, and refuse each when it is damaged?

    python -m benchmarks.golds --task humaneval --data_dir DIR
    python -m benchmarks.golds --task gsm8k --data_dir DIR

A reference answer is what training teaches to write. Damaged it is, for a program, with every returned value wrapped in
a tuple (`wrapped`) and with one operator, comparison or number changed (`changed`; a change can leave the function the
same, so not all of these have to fail); for anything else, the reference answer of an item with another right answer.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from rich.progress import track

from diffmas.answers import code
from diffmas.tasks import Item, Task, TaskArguments, gold, load_task

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def wrapped(source: str) -> str:
    """Every value that a function returns, in a tuple."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):
            node.value = ast.Tuple([ast.Constant("damaged"), node.value or ast.Constant(None)], ast.Load())
    return ast.unparse(tree)


def changed(source: str) -> str | None:
    """The last operator, comparison or number in the program changed; None where it has none."""
    tree = ast.parse(source)
    last: Callable[[], None] | None = None
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
            last = lambda node=node: setattr(node, "op", SWAPS[type(node.op)]())  # noqa: E731
        elif isinstance(node, ast.Compare) and type(node.ops[-1]) in SWAPS:
            last = lambda node=node: node.ops.__setitem__(-1, SWAPS[type(node.ops[-1])]())  # noqa: E731
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            last = lambda node=node: setattr(node, "value", node.value + 1)  # noqa: E731
    if last is None:
        return None
    last()
    return ast.unparse(tree)


def cases(task: Task) -> Iterator[tuple[str, str, Item]]:
    """Kind, text and item of everything there is to check."""
    programs = task.check is code.check
    for i, item in enumerate(task.eval):
        yield "reference", item["answer"], item
        if programs:
            source = code.program(item["answer"])
            for kind, damaged in (("wrapped", wrapped(source)), ("changed", changed(source))):
                if damaged is not None:
                    yield kind, f"```python\n{damaged}\n```", item
        else:
            others = (task.eval[(i + step) % len(task.eval)] for step in range(1, len(task.eval)))
            other = next((o for o in others if gold(o) != gold(item)), None)
            if other is not None:
                yield "another's", other["answer"], item


def main(argv: list[str] | None = None) -> int:
    """Prints how many of each kind count as right; exit status 0 if all references do and no sure damage does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.golds", description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, help="as for python -m diffmas.train")
    parser.add_argument("--data_dir", help="folder with the task's files")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="answers checked at once")
    args = parser.parse_args(argv)
    todo = list(cases(load_task(TaskArguments(task=args.task, data_dir=args.data_dir))))
    checker = load_task(TaskArguments(task=args.task, data_dir=args.data_dir)).check
    counts: dict[str, list[int]] = {}
    with ThreadPoolExecutor(args.workers) as pool:
        results = pool.map(lambda case: checker(case[1], case[2]), todo)
        for (kind, _, item), right in zip(todo, track(results, total=len(todo)), strict=True):
            count = counts.setdefault(kind, [0, 0])
            count[0] += right
            count[1] += 1
            if right != (kind == "reference"):
                print(
                    f"{kind}: {item.get('task_id', item['question'][:60])!r} counts as {'right' if right else 'wrong'}"
                )
    for kind, (right, total) in counts.items():
        print(f"{kind}: {right} of {total} count as right")
    bad = counts["reference"][0] < counts["reference"][1] or any(
        counts.get(k, [0])[0] for k in ("wrapped", "another's")
    )
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
