"""What records say of every method on every task: accuracy with intervals, cost, stability, paired differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from diffmas.comparison.stability import agreement, entropy_curve, perplexity
from diffmas.evaluation.records import Record
from diffmas.evaluation.statistics import Interval, mean_interval, paired_difference

Cell = tuple[str, str, str]


def summarise(records: Iterable[Record], methods: Sequence[str], *, baseline: str = "single") -> dict[str, Any]:
    """Cells (task × method × control) and paired differences, ready for JSON.

    A cell takes the items that all of its seeds have answered. Differences: every method to `baseline` (the first
    method where it is missing), `diffmas` to every other one, and a method's own trace to each control.
    """
    groups: dict[Cell, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.task, record.method, record.control].append(record)
    order = {name: place for place, name in enumerate(methods)}
    tasks = list(dict.fromkeys(task for task, _, _ in groups))
    cells = sorted(
        (cell for cell in groups if cell[1] in order), key=lambda cell: (tasks.index(cell[0]), order[cell[1]])
    )
    outcomes = {cell: Outcomes.of(groups[cell]) for cell in cells}
    differences = []
    for task in tasks:
        here = [method for t, method, control in cells if t == task and control == "matched"]
        if not here:
            continue
        base = baseline if baseline in here else here[0]
        pairs = [(method, base) for method in here if method != base]
        pairs += [("diffmas", method) for method in here if "diffmas" in here and method not in ("diffmas", base)]
        for a, b in pairs:
            differences.append(_difference(outcomes, (task, a, "matched"), (task, b, "matched")))
        for method in here:
            for _, _, control in (c for c in cells if c[:2] == (task, method) and c[2] != "matched"):
                differences.append(_difference(outcomes, (task, method, "matched"), (task, method, control)))
    return {
        "cells": [_describe(cell, groups[cell], outcomes[cell]) for cell in cells],
        "differences": [d for d in differences if d is not None],
    }


class Outcomes:
    """Share of right samples of every item a cell's seeds have all answered."""

    def __init__(self, by_seed: dict[int, dict[int, float]]):
        self.by_seed = by_seed
        self.seeds = sorted(by_seed)

    @classmethod
    def of(cls, records: Sequence[Record]) -> Outcomes:
        right: dict[int, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            right[record.seed][record.index].append(record.correct)
        return cls({seed: {i: float(np.mean(r)) for i, r in items.items()} for seed, items in right.items()})

    def items(self, seeds: Sequence[int]) -> set[int]:
        return set.intersection(*(set(self.by_seed[seed]) for seed in seeds))

    def array(self, seeds: Sequence[int], items: Sequence[int]) -> np.ndarray:
        """`[seeds, items]`."""
        return np.array([[self.by_seed[seed][i] for i in items] for seed in seeds])


def _difference(outcomes: dict[Cell, Outcomes], a: Cell, b: Cell) -> dict[str, Any] | None:
    """The paired difference a − b over the seeds and items both have; None where they share none."""
    first, second = outcomes[a], outcomes[b]
    seeds_a, seeds_b = first.seeds, second.seeds
    # A method that every seed would repeat is answered once, and paired with all seeds of the other.
    if 1 not in (len(seeds_a), len(seeds_b)):
        seeds_a = seeds_b = [seed for seed in seeds_a if seed in seeds_b]
    items = sorted(first.items(seeds_a) & second.items(seeds_b)) if seeds_a else []
    if not items:
        return None
    interval = paired_difference(first.array(seeds_a, items), second.array(seeds_b, items))
    names = {"task": a[0], "a": a[1], "a_control": a[2], "b": b[1], "b_control": b[2]}
    return {**names, **_rounded(interval)}


def _describe(cell: Cell, records: Sequence[Record], outcomes: Outcomes) -> dict[str, Any]:
    task, method, control = cell
    items = sorted(outcomes.items(outcomes.seeds))
    samples = 1 + max(record.sample for record in records)
    first = [record for record in records if record.sample == 0]
    accuracy = mean_interval(outcomes.array(outcomes.seeds, items)) if items else None
    return {
        "task": task,
        "method": method,
        "control": control,
        "seeds": outcomes.seeds,
        "samples": samples,
        "answers": len(records),
        # Those that the longest length allowed ended.
        "cut": round(_mean(r.finish == "length" for r in records), 5),
        "accuracy": None if accuracy is None else _rounded(accuracy),
        # Per item: n samples share the prompts, the latent steps and the texts of earlier agents.
        "answer_tokens": round(samples * _mean(r.tokens for r in records), 2),
        "message_tokens": round(_mean(r.message_tokens for r in first), 2),
        "latent_steps": round(_mean(r.latent_steps for r in first), 2),
        "prefill_tokens": round(_mean(r.prefill_tokens for r in first), 2),
        "seconds": round(samples * _mean(r.seconds for r in records), 5),
        "perplexity": perplexity(records),
        "entropy": entropy_curve(records),
        "agreement": agreement(records),
    }


def _rounded(interval: Interval) -> dict[str, Any]:
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(interval).items()}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
