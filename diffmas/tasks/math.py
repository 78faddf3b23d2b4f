"""MATH: competition problems with LaTeX answers; trained on MATH's training set, evaluated on MATH-500.

The 500 problems (HuggingFaceH4/MATH-500) are from MATH's test set, so the 7500 of the training set
(EleutherAI/hendrycks_math) hold none of them.
"""

from __future__ import annotations

from diffmas.answers import final, mathematics
from diffmas.tasks.base import Item, Task, TaskArguments
from diffmas.tasks.source import Row, Source, build, take

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
TRAIN = Source("EleutherAI/hendrycks_math", "train", ("train",), SUBJECTS)
TEST = Source("HuggingFaceH4/MATH-500", "test", ("test",))


def load(args: TaskArguments) -> Task:
    """Items with `question`, `answer` (the worked solution) and `gold` (in LaTeX)."""
    task = build("math", args, train=TRAIN, evaluation=TEST, make=item, kind=mathematics, prompts="reasoning")
    mathematics.require((held_out["gold"] for held_out in task.eval), "math")
    return task


def item(row: Row) -> Item:
    """Raises `ValueError` for a row without a problem, or whose solution boxes no answer."""
    solution = take(row, "solution")
    gold = row.get("answer") or final.boxed(solution)
    if not gold:
        raise ValueError(f"the gold answer is missing: no field answer, no \\boxed{{}} in {solution!r}")
    return {**row, "question": take(row, "problem"), "answer": solution, "gold": gold}
