"""Answers of one system to a batch of items, with what each one cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from diffmas.agents.controls import CONTROLS
from diffmas.answers import reasoning
from diffmas.evaluation.methods.base import TraceChannel
from diffmas.evaluation.records import Record
from diffmas.generation import Decoding
from diffmas.models.adapters import without_adapters
from diffmas.models.agent_model import evaluating as evaluation_mode
from diffmas.prompts.shortened import counting
from diffmas.support.progress import Lines, terminal
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Task, gold

# Apart by more than there are items, so that no item of one seed draws what another item of the next one draws.
_SEEDS_APART = 1_000_003


def batches(size: int, batch_size: int) -> Iterator[list[int]]:
    """Indices in batches; a last batch of one joins its predecessor, so that every row has another beside it."""
    starts = list(range(0, size, batch_size))
    if len(starts) > 1 and size - starts[-1] == 1:
        starts.pop()
    for begin, end in zip(starts, [*starts[1:], size], strict=True):
        yield list(range(begin, end))


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
    """Records of the items `indices` of `task.eval`, `decoding.samples` each; item i draws from a seed of its own."""
    items = [task.eval[i] for i in indices]
    seeds = [seed * _SEEDS_APART + i for i in indices]
    began = time.perf_counter()
    with counting(task.prompts) as cut:
        reading = channel.read(items, seeds)
        cuts = [cut(item) for item in items]
    rows = system.generate(
        reading.prompt_ids, reading.prompt_lengths, tokenizer, decoding, seeds=seeds, control=CONTROLS[control]
    )
    seconds = (time.perf_counter() - began) / (len(items) * decoding.samples)
    prompts = tokenizer.batch_decode(reading.prompt_ids[-1].split(reading.prompt_lengths[-1]))
    return [
        Record(
            task=task.name,
            method=method,
            control=control,
            seed=seed,
            index=index,
            sample=sample,
            prompt=prompts[row],
            answer=completion.text,
            gold=gold(items[row]),
            extracted=task.extract(reasoning.continued(prompts[row], completion.text)),
            correct=task.check(reasoning.continued(prompts[row], completion.text), items[row]),
            tokens=len(completion.logprobs),
            message_tokens=reading.message_tokens[row],
            latent_steps=reading.latent_steps,
            prefill_tokens=reading.prefill_tokens[row],
            entropies=[round(e, 4) for e in completion.entropies],
            logprob=round(sum(completion.logprobs), 4),
            finish=completion.finish,
            seconds=round(seconds, 6),
            cut_tokens=cuts[row],
        )
        for row, index in enumerate(indices)
        for sample, completion in enumerate(rows[row])
    ]
