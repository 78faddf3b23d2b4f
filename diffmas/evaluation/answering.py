"""Answers of one system to a batch of items, with what each one cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from diffmas.agents.controls import CONTROLS
from diffmas.answers import reasoning
from diffmas.evaluation.methods.base import Reading, TraceChannel
from diffmas.evaluation.records import Record
from diffmas.generation import Completion, Decoding
from diffmas.models.adapters import without_adapters
from diffmas.models.agent_model import evaluating as evaluation_mode
from diffmas.prompts.shortened import counting
from diffmas.support.progress import Lines, terminal
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Item, Task, gold

# Apart by more than there are items, so that no item of one seed draws what another item of the next one draws.
_SEEDS_APART = 1_000_003


def progress_bar(show: bool) -> Progress | Lines:
    """A bar on the terminal: what is being done, how much of it, and how long it will take; lines in a file."""
    if not terminal():
        return Lines(show)
    # Brackets in a name are no markup.
    what = TextColumn("{task.description}", markup=False)
    return Progress(what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), disable=not show)


@contextlib.contextmanager
def evaluating(system: MultiAgentSystem, *, adapter: bool) -> Iterator[None]:
    """In evaluation mode and without gradients; without the adapter too where `adapter` is False."""
    with evaluation_mode(system), torch.no_grad(), contextlib.ExitStack() as without:
        for model in () if adapter else system.models.values():
            without.enter_context(without_adapters(model.model))
        yield


@dataclass(frozen=True)
class Asked:
    """Items of a task as a system's agents read them, and what becomes of their answers.

    Attributes:
        items, indices: of `task.eval`. seeds: one an item.
        reading: what the agents read. prompts: the last one's, as text.
    """

    task: Task
    items: Sequence[Item]
    indices: Sequence[int]
    method: str
    control: str
    seed: int
    seeds: Sequence[int]
    reading: Reading
    prompts: Sequence[str]
    cuts: Sequence[int]

    def records(self, row: int, completions: Sequence[Completion], seconds: float) -> list[Record]:
        """Of the samples of one row; `seconds`: what each of them took."""
        return [
            Record(
                task=self.task.name,
                method=self.method,
                control=self.control,
                seed=self.seed,
                index=self.indices[row],
                sample=sample,
                prompt=self.prompts[row],
                answer=completion.text,
                gold=gold(self.items[row]),
                extracted=self.task.extract(whole := reasoning.continued(self.prompts[row], completion.text)),
                correct=self.task.check(whole, self.items[row]),
                tokens=len(completion.logprobs),
                message_tokens=self.reading.message_tokens[row],
                latent_steps=self.reading.latent_steps,
                prefill_tokens=self.reading.prefill_tokens[row],
                entropies=[round(e, 4) for e in completion.entropies],
                logprob=round(sum(completion.logprobs), 4),
                finish=completion.finish,
                seconds=round(seconds, 6),
                cut_tokens=self.cuts[row],
            )
            for sample, completion in enumerate(completions)
        ]


def ask(
    channel: TraceChannel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    indices: Sequence[int],
    *,
    method: str,
    control: str,
    seed: int,
) -> Asked:
    """The items `indices` of `task.eval` as the agents read them; item i draws from a seed of its own."""
    items = [task.eval[i] for i in indices]
    seeds = [seed * _SEEDS_APART + i for i in indices]
    with counting(task.prompts) as cut:
        reading = channel.read(items, seeds)
        cuts = [cut(item) for item in items]
    prompts = tokenizer.batch_decode(reading.prompt_ids[-1].split(reading.prompt_lengths[-1]))
    return Asked(task, items, indices, method, control, seed, seeds, reading, prompts, cuts)


def answer(
    system: MultiAgentSystem,
    channel: TraceChannel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    indices: Sequence[int],
    *,
    method: str,
    control: str,
    seed: int,
) -> list[Record]:
    """Records of the items `indices` of `task.eval`, `decoding.samples` each."""
    began = time.perf_counter()
    asked = ask(channel, task, tokenizer, indices, method=method, control=control, seed=seed)
    ids, lengths = asked.reading.prompt_ids, asked.reading.prompt_lengths
    rows = system.generate(ids, lengths, tokenizer, decoding, seeds=asked.seeds, control=CONTROLS[control])
    seconds = (time.perf_counter() - began) / (len(indices) * decoding.samples)
    return [record for row, completions in enumerate(rows) for record in asked.records(row, completions, seconds)]
