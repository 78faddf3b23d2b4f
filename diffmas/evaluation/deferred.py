"""Answers in two phases: all senders run, then vLLM decodes, with one model in memory at a time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from diffmas.agents.controls import CONTROLS
from diffmas.evaluation.answering import Asked, ask
from diffmas.evaluation.methods.base import TraceChannel
from diffmas.evaluation.records import Record
from diffmas.generation import Decoding
from diffmas.generation.engine import stop_ids
from diffmas.serving.options import trace_bytes
from diffmas.serving.rows import Row, store_rows
from diffmas.serving.traces import TraceStore
from diffmas.serving.vllm_engine import EngineSource, VllmEngine
from diffmas.serving.weights import Adapter, fingerprint, loadable, running_adapter, write_adapter, write_base
from diffmas.support.leftovers import vanishing_folder
from diffmas.system import MultiAgentSystem
from diffmas.tasks import Task


@dataclass
class _Waiting:
    """Answers that one engine decodes: those behind one base model, under one way of decoding."""

    asked: list[tuple[Asked, int]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    kept: list[Callable[[list[Record]], None]] = field(default_factory=list)


@dataclass
class _Base:
    """A base model as vLLM loads it."""

    model: str
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    stops: set[int]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    waiting: dict[Decoding, _Waiting] = field(default_factory=dict)


class Deferred:
    """What waits to be decoded.

    Args:
        folder: where traces and weights are kept until they have been used.
        options: further arguments of vLLM's engine.
        max_trace_bytes: of all traces; None: as many as `folder` takes.
    """

    def __init__(self, folder: Path, options: dict[str, Any], max_trace_bytes: int | None = None):
        self._folder, self._options = folder, options
        self._store = TraceStore(folder / "traces", max_bytes=max_trace_bytes)
        self._bases: dict[str, _Base] = {}
        # Of the system whose rows came last; several variants are on one model.
        self._known: tuple[Any, str] = (None, "")

    def add(
        self,
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
        kept: Callable[[list[Record]], None],
    ) -> None:
        """Run the senders of some items, as :func:`~diffmas.evaluation.answering.answer` would, and keep their traces.

        `kept` is told a row's records once it has been decoded.
        """
        asked = ask(channel, task, tokenizer, indices, method=method, control=control, seed=seed)
        model = self._fingerprint(system)
        if model not in self._bases:
            self._bases[model] = _Base(
                loadable(system) or write_base(system, tokenizer, self._folder / f"base-{len(self._bases)}"),
                str(system.agent_model.language_model.dtype).removeprefix("torch."),
                tokenizer,
                stop_ids(system.agent_model, tokenizer),
            )
        base, adapter = self._bases[model], None
        if (name := running_adapter(system)) is not None:
            adapter = write_adapter(system, name, self._folder)
            base.adapters[adapter.name] = adapter
        waiting = base.waiting.setdefault(decoding, _Waiting())
        rows = store_rows(
            system, asked.reading.prompt_ids, asked.reading.prompt_lengths, decoding, self._store, model, adapter,
            seeds=asked.seeds, control=CONTROLS[control],
        )  # fmt: skip
        for number, row in enumerate(rows):
            waiting.asked.append((asked, number))
            waiting.rows.append(row)
            waiting.kept.append(kept)

    @property
    def count(self) -> int:
        """Answers that wait."""
        return sum(len(w.rows) * d.samples for base in self._bases.values() for d, w in base.waiting.items())

    def _fingerprint(self, system: MultiAgentSystem) -> str:
        model = system.agent_model.language_model
        if self._known[0] is not model:
            self._known = model, fingerprint(system)
        return self._known[1]

    def decode(self, advance: Callable[[int], None]) -> None:
        """Have vLLM decode everything, and forget it; `advance(n)` is told of n more answers.

        Raises:
            ValueError, RuntimeError: as :meth:`VllmEngine.decode`.
        """
        self._known = None, ""
        free_memory()
        for model, base in self._bases.items():
            source = EngineSource(
                base.model, model, base.dtype, self._store.folder, [*base.adapters.values()], self._options
            )
            engine = VllmEngine(source, base.tokenizer, base.stops)
            try:
                for decoding, waiting in base.waiting.items():
                    self._decode(engine, decoding, waiting, advance)
            finally:
                engine.close()
        self._bases.clear()

    def _decode(
        self, engine: VllmEngine, decoding: Decoding, waiting: _Waiting, advance: Callable[[int], None]
    ) -> None:
        before = time.perf_counter()
        for index, completions in engine.decode(waiting.rows, decoding):
            (asked, number), row, now = waiting.asked[index], waiting.rows[index], time.perf_counter()
            # Rows are decoded together: each is given the time since the one before it was done.
            seconds = (row.seconds / row.beside + now - before) / decoding.samples
            before = now
            waiting.kept[index](asked.records(number, completions, seconds))
            if row.trace is not None:
                self._store.release(row.trace)
            advance(decoding.samples)


@contextmanager
def deferred(
    beside: str | Path | None, options: dict[str, Any], max_trace_gb: float | None = None
) -> Iterator[Deferred]:
    """Answers to be decoded on vLLM; nothing is left of them on the disk, however this process ends.

    Args:
        beside: the folder in which traces and weights are kept meanwhile; default: where temporary files are.
        max_trace_gb: of all traces.

    """
    with vanishing_folder(beside) as folder:
        yield Deferred(folder, options, trace_bytes(max_trace_gb))


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
