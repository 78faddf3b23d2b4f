"""How stable decoding is (DiffMAS, arXiv 2604.21794): token entropy along the answer, perplexity, agreeing samples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffmas.evaluation.records import Record

#: Points of a curve; longer answers are averaged over stretches of equal length.
POINTS = 64


def entropy_curve(records: Sequence[Record], points: int = POINTS) -> dict[str, list[float]]:
    """Mean entropy in nats of the next-token distribution by position in the answer.

    Returns:
        `position`: middle of each stretch, from 0. `mean`, and `low` and `high`, the quartiles, of the entropies of all
        tokens in it. `answers`: how many answers reach it.
    """
    longest = max((len(r.entropies) for r in records), default=0)
    if longest == 0:
        return {"position": [], "mean": [], "low": [], "high": [], "answers": []}
    width = math.ceil(longest / points)
    found: dict[int, list[float]] = defaultdict(list)
    reached: Counter[int] = Counter()
    for record in records:
        for begin in range(0, len(record.entropies), width):
            found[begin].extend(record.entropies[begin : begin + width])
            reached[begin] += 1
    begins = sorted(found)
    quartiles = [np.quantile(found[b], [0.25, 0.75]) for b in begins]
    return {
        "position": [b + (width - 1) / 2 for b in begins],
        "mean": [round(float(np.mean(found[b])), 4) for b in begins],
        "low": [round(float(q[0]), 4) for q in quartiles],
        "high": [round(float(q[1]), 4) for q in quartiles],
        "answers": [reached[b] for b in begins],
    }


def perplexity(records: Sequence[Record]) -> dict[str, float | None]:
    """Perplexity of the generated answers under the model that wrote them.

    Returns:
        `tokens`: exp of the mean negative log-probability of all tokens. `median`: over answers, each by its own mean.
    """
    written = [r for r in records if r.tokens]
    if not written:
        return {"tokens": None, "median": None}
    total = sum(r.logprob for r in written) / sum(r.tokens for r in written)
    each = [math.exp(-r.logprob / r.tokens) for r in written]
    return {"tokens": round(math.exp(-total), 4), "median": round(float(np.median(each)), 4)}


def agreement(records: Sequence[Record]) -> dict[str, Any]:
    """How many of an item's n samples agree: the size of the largest group with the same final answer.

    A sample without a final answer agrees with none. An item counts once per seed, and only with all its samples.

    Returns:
        `counts`: items by number of agreeing samples, 0 … n. `mean`: of that number.
    """
    samples = 1 + max((r.sample for r in records), default=-1)
    groups: dict[tuple[int, int], list[str | None]] = defaultdict(list)
    for record in records:
        groups[record.seed, record.index].append(record.extracted)
    counts = [0] * (samples + 1)
    for answers in groups.values():
        if len(answers) == samples:
            largest = max(Counter(a for a in answers if a is not None).values(), default=0)
            counts[largest] += 1
    items = sum(counts)
    mean = sum(n * c for n, c in enumerate(counts)) / items if items else None
    return {"counts": counts, "mean": None if mean is None else round(mean, 4)}
