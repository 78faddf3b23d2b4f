"""Accuracy of a system on a task, under each trace control and against the system without training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from diffmas.agents.controls import CONTROLS
from diffmas.agents.thinking import switched
from diffmas.agents.topology import alone
from diffmas.evaluation.answering import answer, evaluating, progress_bar
from diffmas.evaluation.deferred import Deferred
from diffmas.evaluation.methods.base import TraceChannel
from diffmas.evaluation.methods.text import TextChannel, last_alone
from diffmas.evaluation.records import Record, RecordFile
from diffmas.generation import Decoding
from diffmas.generation.received import batches
from diffmas.support.distributed import gathered, is_sharded, process, processes, root_unsharded
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Item, Task

#: What an evaluation measures, in the order it is reported; the key is the suffix of `accuracy` in summaries.
VARIANTS = {
    "matched": "trained, the row's own trace",
    "mismatched": "trained, another row's trace",
    "zero": "trained, a zero trace",
    "noise": "trained, norm-matched noise",
    "training_free": "latent steps without the adapter",
    "single": "one agent without the adapter",
}
#: The same one agent in a fixed mode, where the chat template has a switch for thinking.
MODES = {
    "single_thinking": "one agent without the adapter, thinking",
    "single_no_thinking": "one agent without the adapter, not thinking",
}
#: The same agents with texts in place of a trace, where an evaluation is asked for them.
TEXT = {"text": "agents talking in text, without the adapter"}
LABELS = VARIANTS | TEXT | MODES
#: What records of the trained system call its method.
TRAINED = "trained"


def check_message_tokens(value: int | None) -> None:
    """Raise `ValueError` unless it is None or a positive number of tokens."""
    if value is not None and value < 1:
        raise ValueError(f"max_message_tokens is {value}; allowed: integers ≥ 1")


def variant_of(record: Record) -> str:
    """Which of :data:`LABELS` a record of an evaluation belongs to."""
    return record.control if record.method == TRAINED else record.method


class Prepared(NamedTuple):
    """A system and its channel as a variant has them, and what its records call method and control."""

    system: MultiAgentSystem
    channel: TraceChannel
    method: str
    control: str


class Evaluator:
    """Evaluates one system on one task.

    Several processes share out the batches and all get every record. The layers of a sharded system are gathered for
    each call by all processes at once, which then make the same calls.

    Args:
        batch_size: rows decoded together; at least 2, since a mismatched trace is another row's.
        max_message_tokens: longest text of an agent before the last; default: as long as an answer may be.
    """

    def __init__(
        self,
        system: MultiAgentSystem,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        decoding: Decoding,
        *,
        batch_size: int = 8,
        max_message_tokens: int | None = None,
    ):
        if batch_size < 2:
            raise ValueError(f"batch_size is {batch_size}; allowed: integers ≥ 2 (a mismatched trace is another row's)")
        check_message_tokens(max_message_tokens)
        if len(task.eval) == 0:
            raise ValueError("the evaluation set is empty; allowed: at least one item")
        self.system, self.tokenizer, self.task = system, tokenizer, task
        self.decoding, self.batch_size = decoding, batch_size
        longest = decoding.max_new_tokens if max_message_tokens is None else max_message_tokens
        self._messages = replace(decoding, max_new_tokens=longest)

    def run(self, variant: str, items: Sequence[Item], advance: Callable[[int], None] = lambda n: None) -> list[Record]:
        """Records of `items`, in order; `advance(n)` is told whenever n more are done."""
        task = replace(self.task, eval=items)
        with self.prepared(variant) as parts:
            return self._share(parts, task, advance)

    @contextlib.contextmanager
    def prepared(self, variant: str) -> Iterator[Prepared]:
        """Everything that answers as `variant`, for as long as it is needed.

        Raises:
            ValueError: an unknown variant.
        """
        if variant not in LABELS:
            raise ValueError(f"variant is {variant!r}; allowed: {', '.join(LABELS)}")
        with root_unsharded(self.system):
            system = self.system
            if variant in MODES:
                one = switched(alone(system.topology), self.tokenizer, variant == "single_thinking")
                system = system.of_models(one)
            elif variant == "single":
                system = system.of_models(alone(system.topology))
            elif variant in TEXT:
                system = system.of_models(last_alone(system.topology))
            elif variant == "training_free":
                system = system.of_models(system.topology, **asdict(system.alignment_options.untrained))
            method, control = (TRAINED, variant) if variant in CONTROLS else (variant, "matched")
            parts = (system, self.task, self.tokenizer)
            channel = TraceChannel(*parts)
            if variant in TEXT:
                channel = TextChannel(*parts, self.system.topology, self._messages)
            with evaluating(system, adapter=variant in CONTROLS):
                yield Prepared(system, channel, method, control)

    def _share(self, parts: Prepared, task: Task, advance: Callable[[int], None]) -> list[Record]:
        first, step = (0, 1) if is_sharded(self.system) else (process(), processes())
        records: list[Record] = []
        all_batches = list(batches(len(task.eval), self.batch_size))
        for begin in range(0, len(all_batches), step):
            together = all_batches[begin : begin + step]
            for batch in together[first : first + 1]:
                records += answer(
                    parts.system, parts.channel, task, self.tokenizer, self.decoding, batch,
                    method=parts.method, control=parts.control, seed=self.decoding.seed,
                )  # fmt: skip
            advance(sum(map(len, together)))
        return records if step == 1 else sorted(gathered(records), key=lambda record: record.index)


def evaluate_all(
    evaluator: Evaluator, variants: Sequence[str], *, show_progress: bool = True
) -> tuple[dict[str, float], list[Record]]:
    """Accuracy by variant and all records, with a progress bar on the terminal."""
    items = evaluator.task.eval
    accuracies, records = {}, []
    with progress_bar(show_progress) as progress:
        bar = progress.add_task("evaluating", total=len(items) * len(variants))
        for variant in variants:
            progress.update(bar, description=f"evaluating: {LABELS[variant]}")
            found = evaluator.run(variant, items, lambda n: progress.advance(bar, n))
            accuracies[variant] = sum(r.correct for r in found) / len(found)
            records += found
    return accuracies, records


def evaluate_deferred(
    evaluator: Evaluator, variants: Sequence[str], waiting: Deferred, file: RecordFile, *, show_progress: bool = True
) -> tuple[dict[str, float], list[Record]]:
    """Like :func:`evaluate_all`, but for the answers, which are decoded on vLLM once the system's memory is given back.

    What `file` has already is not asked again; what it gets is on the disk as it is decoded.
    """
    task, seed = evaluator.task, evaluator.decoding.seed
    with progress_bar(show_progress) as progress:
        bar = progress.add_task("senders", total=len(task.eval) * len(variants))
        for variant in variants:
            progress.update(bar, description=f"senders: {LABELS[variant]}")
            with evaluator.prepared(variant) as parts:
                for indices in batches(len(task.eval), evaluator.batch_size):
                    wanted = {
                        (task.name, parts.method, parts.control, seed, i, s)
                        for i in indices
                        for s in range(evaluator.decoding.samples)
                    }
                    if not wanted <= file.keys:
                        waiting.add(
                            parts.system, parts.channel, task, evaluator.tokenizer, evaluator.decoding, indices,
                            method=parts.method, control=parts.control, seed=seed, kept=file.append,
                        )  # fmt: skip
                    progress.advance(bar, len(indices))
    # Another model comes in its place.
    evaluator.system.to("meta")
    with progress_bar(show_progress) as progress:
        total = len(task.eval) * len(variants) * evaluator.decoding.samples
        bar = progress.add_task("decoding on vLLM", total=total, completed=total - waiting.count)
        waiting.decode(lambda n: progress.advance(bar, n))
    found: dict[str, list[Record]] = {variant: [] for variant in variants}
    for record in sorted(file.records, key=lambda record: (record.index, record.sample)):
        if (variant := variant_of(record)) in found:
            found[variant].append(record)
    accuracies = {variant: sum(r.correct for r in records) / len(records) for variant, records in found.items()}
    return accuracies, [record for records in found.values() for record in records]
