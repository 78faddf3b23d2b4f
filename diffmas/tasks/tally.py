"""Tally: two senders know how many things their people have; a sum or a difference across them is asked.

`tally:n=6:top=50:ask=sum`: each sender knows six quantities of 1 to 50, and only sums are asked.
"""

from __future__ import annotations

import functools
import random

from diffmas.answers import mathematics
from diffmas.tasks import base, drawn, words

ASKED = ("sum", "difference")
OPTIONS: dict[str, range | tuple[str, ...]] = {"n": range(1, 17), "top": range(2, 10_001), "ask": (*ASKED, "both")}
#: Of one and of more.
GOODS = {
    "apple": "apples", "pear": "pears", "egg": "eggs", "book": "books", "coin": "coins", "marble": "marbles",
    "stamp": "stamps", "pencil": "pencils", "button": "buttons", "shell": "shells", "ticket": "tickets",
    "candle": "candles", "card": "cards", "ribbon": "ribbons", "cookie": "cookies", "balloon": "balloons",
}  # fmt: skip
QUANTITIES = (
    "{who} has {many}.",
    "{who} owns {many}.",
    "There are {many} in {who}'s bag.",
    "{who} counted {many} at home.",
    "{who} came with {many}.",
    "In the end, {who} was left with {many}.",
)
QUESTIONS = {
    "sum": (
        "How many {goods} do {a} and {b} have together?",
        "{a} and {b} put their {goods} on one pile. How many are there?",
        "What is the total number of {goods} that {a} and {b} have?",
        "Counting both {a} and {b}, how many {goods} are there?",
    ),
    "difference": (
        "How many more {goods} does {a} have than {b}?",
        "{a} has more {goods} than {b}. How many more?",
        "By how many {goods} is {b} behind {a}?",
        "How many {goods} does {b} need to have as many as {a}?",
    ),
}


def make(rng: random.Random, n: int = 3, top: int = 20, ask: str = "both") -> base.Item:
    """An item with `first` and `second`, `question`, `answer` and `gold` (a whole number ≥ 1)."""
    kind = rng.choice(ASKED) if ask == "both" else ask
    people = rng.sample(words.PEOPLE, 2 * n)
    goods = rng.sample(list(GOODS), 2)
    asked, quantities = rng.choice(goods), [rng.randint(1, top) for _ in people]
    # The first of each half are those who are asked about.
    things = [asked if i in (0, n) else rng.choice(goods) for i in range(2 * n)]
    while kind == "difference" and quantities[0] == quantities[n]:
        quantities[n] = rng.randint(1, top)
    (a, more), (b, less) = sorted(((people[i], quantities[i]) for i in (0, n)), key=lambda p: -p[1])
    if kind == "sum" and rng.random() < 0.5:
        a, b = b, a
    known = list(zip(people, quantities, things, strict=True))
    gold = str(more + less if kind == "sum" else more - less)
    return {
        "first": _told(rng, known[:n]),
        "second": _told(rng, known[n:]),
        "question": rng.choice(QUESTIONS[kind]).format(a=a, b=b, goods=GOODS[asked]),
        "answer": gold,
        "gold": gold,
        "content": repr(sorted(known)),
    }


def _told(rng: random.Random, known: list[tuple[str, int, str]]) -> str:
    told = [
        words.sentence(rng.choice(QUANTITIES).format(who=who, many=f"{q} {thing if q == 1 else GOODS[thing]}"))
        for who, q, thing in known
    ]
    rng.shuffle(told)
    return " ".join(told).replace("There are 1 ", "There is 1 ")


def load(args: base.TaskArguments) -> base.Task:
    """Raises `ValueError` for an option that there is not, or a value that it does not take."""
    draw = functools.partial(make, **drawn.options(args.task, OPTIONS))
    return drawn.build(args, "tally", draw, mathematics.check, mathematics.extract)
