"""Facts: the sender knows who left what where, and the solver is asked about one of the things.

People and things come back in a row's facts, so that both have to be looked at. `facts:n=8:noise=4:places=16`: eight
facts among four sentences that say nothing of places, with sixteen places there are.
"""

from __future__ import annotations

import functools
import itertools
import random

from diffmas.tasks import base, drawn, words

OPTIONS = {"n": range(1, 33), "noise": range(33), "places": range(2, len(words.PLACES) + 1)}
FACTS = (
    "{who} left the {thing} {at}.",
    "{who} forgot the {thing} {at}.",
    "{who} put the {thing} down {at}.",
    "{who}'s {thing} is {at}.",
    "{who}'s {thing} was last seen {at}.",
    "{at}, {who} left the {thing}.",
    "The {thing} that belongs to {who} is {at}.",
    "It was {at} that {who} left the {thing}.",
    "You will find {who}'s {thing} {at}.",
    "After a long day, {who} left the {thing} {at}.",
    "Somebody saw {who}'s {thing} {at}.",
    "{who} had to go and left the {thing} {at}.",
)
NOISE = (
    "{who} is very fond of the {thing}.",
    "{who} bought the {thing} last year.",
    "The {thing} was a present to {who}.",
    "{who} once lent the {thing} to a friend.",
    "{who} would never sell the {thing}.",
)
QUESTIONS = (
    "Where did {who} leave the {thing}?",
    "Where is {who}'s {thing}?",
    "Where can {who} find the {thing}?",
    "{who} is looking for the {thing}. Where is it?",
    "Where should we look for {who}'s {thing}?",
    "Do you know where {who} left the {thing}?",
)


def make(rng: random.Random, n: int = 4, noise: int = 0, places: int = len(words.PLACES)) -> base.Item:
    """An item with `evidence`, `question`, `answer` ("in the kitchen") and `gold` ("kitchen")."""
    several = max(2, (max(n, noise) + 1) // 2)
    pairs = list(itertools.product(rng.sample(words.PEOPLE, several), rng.sample(words.THINGS, several)))
    known = [(*pair, rng.choice(list(words.PLACES)[:places])) for pair in rng.sample(pairs, n)]
    told = [_fact(rng, *fact) for fact in known]
    told += [rng.choice(NOISE).format(who=who, thing=thing) for who, thing in rng.sample(pairs, noise)]
    rng.shuffle(told)
    who, thing, place = rng.choice(known)
    return {
        "evidence": " ".join(told),
        "question": rng.choice(QUESTIONS).format(who=who, thing=thing),
        "answer": words.at(place),
        "gold": place,
        "content": repr(sorted(known)),
    }


def _fact(rng: random.Random, who: str, thing: str, place: str) -> str:
    return words.sentence(rng.choice(FACTS).format(who=who, thing=thing, at=words.at(place)))


def load(args: base.TaskArguments) -> base.Task:
    """Raises `ValueError` for an option that there is not, or a number out of its range."""
    draw = functools.partial(make, **drawn.options(args.task, OPTIONS))
    return drawn.build(args, "facts", draw, words.names_place, words.place)
