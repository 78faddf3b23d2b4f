"""Two hops: one sender knows in which container each thing is, the other where each container is.

Neither suffices: what is asked of the solver is where a thing is. `two_hop:n=8` is about eight things.
"""

from __future__ import annotations

import functools
import itertools
import random

from diffmas.tasks import base, drawn, words

OPTIONS = {"n": range(2, 17)}
FIRST = (
    "{who} put the {thing} into the {container}.",
    "{who}'s {thing} is in the {container}.",
    "The {container} holds {who}'s {thing}.",
    "In the {container} there is the {thing} of {who}.",
    "{who} keeps the {thing} in the {container}.",
    "{who} hid the {thing} in the {container}.",
)
SECOND = (
    "The {container} is {at}.",
    "The {container} stands {at}.",
    "Somebody took the {container} away, and now it is {at}.",
    "You will find the {container} {at}.",
    "{at} there is the {container}.",
    "The {container} was last seen {at}.",
)
QUESTIONS = (
    "Where is {who}'s {thing}?",
    "Where can {who} find the {thing}?",
    "{who} needs the {thing}. Where is it?",
    "To which place does {who} have to go for the {thing}?",
    "Where should we look for {who}'s {thing}?",
)


def make(rng: random.Random, n: int = 4) -> base.Item:
    """An item with `first` and `second`, `question`, `answer` ("in the attic") and `gold` ("attic")."""
    several = max(2, (n + 1) // 2)
    pairs = itertools.product(rng.sample(words.PEOPLE, several), rng.sample(words.THINGS, several))
    containers = rng.sample([f"{c} {k}" for c, k in itertools.product(words.COLORS, words.CONTAINERS)], n)
    places = [rng.choice(list(words.PLACES)) for _ in range(n)]
    known = list(zip(rng.sample(list(pairs), n), containers, places, strict=True))
    first = [rng.choice(FIRST).format(who=who, thing=thing, container=c) for (who, thing), c, _ in known]
    second = [rng.choice(SECOND).format(container=c, at=words.at(place)) for _, c, place in known]
    rng.shuffle(second)
    (who, thing), _, place = rng.choice(known)
    return {
        "first": " ".join(first),
        "second": " ".join(map(words.sentence, second)),
        "question": rng.choice(QUESTIONS).format(who=who, thing=thing),
        "answer": words.at(place),
        "gold": place,
        "content": repr(sorted(known)),
    }


def load(args: base.TaskArguments) -> base.Task:
    """Raises `ValueError` for an option that there is not, or a number out of its range."""
    draw = functools.partial(make, **drawn.options(args.task, OPTIONS))
    return drawn.build(args, "two_hop", draw, words.names_place, words.place)
