"""Batches by length, and the micro-batch and checkpointing that the memory there is allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from rich.progress import track
from transformers.trainer_pt_utils import LengthGroupedSampler

from diffmas.agents.costs import Plan, Shape, floor_seconds
from diffmas.agents.room import available_bytes
from diffmas.models.activation_checkpointing import CHECKPOINTING
from diffmas.support.progress import announced, counted, terminal
from diffmas.system import MultiAgentSystem
from diffmas.training.ceilings import measure_ceilings
from diffmas.training.memory import MemoryModel, calibrate, plan_of

#: Of the memory that is free, what is planned for; the rest is left to fragmentation and to others.
SHARE = 0.9
_CHUNK = 256


class ItemLengths:
    """Token counts of every item: prompts by agent, and the answer; found on first use, with a progress bar."""

    def __init__(self, items: Sequence[Mapping[str, Any]], collator, *, show_progress: bool = True):
        self._items, self._collator, self._show_progress = items, collator, show_progress

    @cached_property
    def rows(self) -> list[tuple[int, ...]]:
        """Per item, its prompts' lengths in the order of the topology's agents, and its answer's."""
        rows: list[tuple[int, ...]] = []
        starts = range(0, len(self._items), _CHUNK)
        if terminal():
            bar = track(starts, "counting tokens", transient=True, disable=not self._show_progress)
        else:
            bar = counted(starts, f"counting tokens, {_CHUNK} items at a time", show=self._show_progress)
        for begin in bar:
            end = min(begin + _CHUNK, len(self._items))
            batch = self._collator([self._items[i] for i in range(begin, end)])
            rows += zip(*batch["prompt_lengths"], batch["answer_lengths"], strict=True)
        return rows

    @cached_property
    def totals(self) -> list[int]:
        """Tokens of every item, all agents together."""
        return [sum(row) for row in self.rows]

    @property
    def count(self) -> int:
        """Of the items."""
        return len(self._items)

    def longest_item(self) -> tuple[int, int]:
        """Index and tokens of the longest item."""
        index = max(range(self.count), key=self.totals.__getitem__)
        return index, self.totals[index]

    def longest(self, count: int) -> tuple[list[list[int]], list[int]]:
        """Prompt lengths by agent and answer lengths of the `count` longest items."""
        order = sorted(range(len(self.rows)), key=self.totals.__getitem__, reverse=True)[:count]
        *prompts, answers = map(list, zip(*(self.rows[i] for i in order), strict=True))
        return prompts, answers


class LengthGrouped(LengthGroupedSampler):
    """transformers' sampler by length; its order depends on seed and epoch alone, so that a resumed run repeats it."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        super().__init__(batch_size, lengths=list(lengths))
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return super().__iter__()


@dataclass(frozen=True)
class Fit:
    """A micro-batch of `rows`: its checkpointing, its predicted peak of `budget` bytes, its `seconds` a row at best."""

    rows: int
    checkpointing: str
    peak: float
    budget: float
    seconds: float


def fit(
    models: Mapping[str, MemoryModel],
    plan: Callable[[int], Plan],
    shapes: Mapping[str, Shape],
    *,
    rows: Sequence[int],
    budget: float,
    rates: tuple[float, float],
) -> Fit:
    """The fastest of the micro-batches `rows`, under one of the checkpointing modes of `models`, that fits `budget`.

    Its time is the floor of `plan(rows)` with the FLOPs and bytes of what is recomputed. A latent step's recomputation
    reads all weights for a few tokens' activations, so that latent steps are the last to be recomputed.

    Args:
        models: memory model by checkpointing mode. plan: the trajectory of so many rows. shapes: of models, by name.
        budget: bytes. rates: FLOP and bytes a second (:func:`~diffmas.training.ceilings.measure_ceilings`).

    Raises:
        ValueError: none fits.
    """
    choices = []
    for mode, model in models.items():
        for count in rows:
            seconds = floor_seconds(plan(count).work(shapes, mode), *rates) / count
            choices.append(Fit(count, mode, model.peak(plan(count)), budget, seconds))
    fitting = [choice for choice in choices if choice.peak <= budget]
    if not fitting:
        raise ValueError(
            f"a micro-batch of {min(rows)} rows needs {min(c.peak for c in choices) / 1e9:.3g} GB with checkpointing "
            f"{' or '.join(models)}, and {budget / 1e9:.3g} GB are there; allowed: a smaller "
            "per_device_train_batch_size, --auto_batch, --checkpointing all, or shorter prompts"
        )
    return min(fitting, key=lambda choice: (choice.seconds, -choice.rows))


def adapt(system: MultiAgentSystem, args, lengths: ItemLengths, *, checkpointing: str) -> Fit:
    """Set the micro-batch of training arguments `args` (with `auto_batch`) and the system's checkpointing ("auto").

    Micro-batch × accumulation steps stays what `args` asked for. Processes agree on the least of their memories. Every
    process holds whole weights.
    """
    system.to(args.device)
    budget = SHARE * available_bytes(args.device) if args.memory_limit_gb is None else 1e9 * args.memory_limit_gb
    if torch.distributed.is_initialized():
        least = torch.tensor(float(budget), device=args.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        budget = float(least)
    autocast = autocast_dtype(args)
    # Adam's two moments; gradients are in the memory model.
    budget -= 2 * sum(p.numel() * p.element_size() for p in system.parameters() if p.requires_grad)
    asked = args.per_device_train_batch_size * args.gradient_accumulation_steps
    show = args.process_index == 0
    models = {}
    for mode in _modes(checkpointing):
        with announced(f"measuring the memory of checkpointing {mode}", show=show):
            models[mode] = _calibrated(system, mode, autocast)
    with announced("measuring what this machine computes and copies a second", show=show):
        rates = measure_ceilings(args.device, autocast or system.agent_model.language_model.dtype)
    choice = fit(
        models,
        lambda count: plan_of(system, *lengths.longest(count)),
        {name: Shape.of(model, autocast) for name, model in system.models.items()},
        rows=[n for n in range(1, asked + 1) if asked % n == 0]
        if args.auto_batch
        else [args.per_device_train_batch_size],
        budget=budget,
        rates=rates,
    )
    system.checkpointing = choice.checkpointing
    args.per_device_train_batch_size = choice.rows
    args.gradient_accumulation_steps = asked // choice.rows
    return choice


def autocast_dtype(args) -> torch.dtype | None:
    """What training computes in under mixed precision; None without."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def print_fit(args, choice: Mapping[str, Any]) -> None:
    """What was chosen and why, on a line."""
    if args.process_index == 0:
        print(
            f"micro-batch {choice['rows']} × {args.gradient_accumulation_steps} accumulation steps, checkpointing "
            f"{choice['checkpointing']}: at most {choice['peak'] / 1e9:.3g} of {choice['budget'] / 1e9:.3g} GB",
            flush=True,
        )


def _modes(checkpointing: str) -> Sequence[str]:
    return CHECKPOINTING if checkpointing == "auto" else [checkpointing]


def _calibrated(system: MultiAgentSystem, mode: str, autocast: torch.dtype | None) -> MemoryModel:
    before, system.checkpointing = system.checkpointing, mode
    try:
        return calibrate(system, autocast)
    finally:
        system.checkpointing = before
