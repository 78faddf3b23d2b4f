"""Answers of a system whose last agent decodes on vLLM."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diffmas.agents.controls import Control
from diffmas.generation.decoding import Completion, Decoding
from diffmas.generation.engine import stop_ids
from diffmas.models.agent_model import Lengths
from diffmas.serving.options import check_installed
from diffmas.serving.rows import Row, check_embeddable, embedded_rows, store_rows
from diffmas.serving.traces import TraceStore
from diffmas.serving.vllm_engine import EngineSource, VllmEngine
from diffmas.serving.weights import fingerprint, running_adapter, write_adapter, write_base
from diffmas.system import MultiAgentSystem


class VllmDecoder:
    """A system's answers, decoded by vLLM: :meth:`generate` takes and gives what the system's own does.

    The senders run here, and their traces go through files; both models are in memory at once. Where that is too much,
    `python -m diffmas.eval --engine vllm` frees one before it loads the other.

    With `prompt_embeds`, no traces are written: vLLM gets what all agents read and thought as input embeddings, and
    writes keys and values of it itself. That is less to hand over and more to compute, and needs a chain of agents with
    full hand-over, of one model and one adapter.

    Args:
        system: its weights, as they are now, are those that vLLM decodes with.
        tokenizer: default: the system's.
        folder: where traces and weights are kept while it is open, e.g. in `/dev/shm`; default: a temporary one.
        model: folder or hub name of the base model, for vLLM to load; default: it is written to `folder`.
        max_trace_bytes: of all traces at once; None: as many as `folder` takes.
        prompt_embeds: hand over input embeddings instead of traces.
        entropies: as for :class:`VllmEngine`.
        options: further arguments of vLLM's engine, such as `tensor_parallel_size`, `gpu_memory_utilization` and
            `max_model_len`.

    Raises:
        ModuleNotFoundError: no vLLM. ValueError: options that vLLM refuses, a model it cannot load, or agents whose
            traces it would not write itself.
    """

    def __init__(
        self,
        system: MultiAgentSystem,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        folder: str | Path | None = None,
        model: str | None = None,
        max_trace_bytes: int | None = None,
        prompt_embeds: bool = False,
        entropies: bool = False,
        **options: Any,
    ):
        check_installed()
        self._system, self._tokenizer = system, tokenizer or system.tokenizer
        if self._tokenizer is None:
            raise ValueError("the system has no tokenizer; allowed: tokenizer=…")
        self._embedded = prompt_embeds
        if prompt_embeds:
            check_embeddable(system)
            if max_trace_bytes is not None:
                raise ValueError(f"max_trace_bytes is {max_trace_bytes}; allowed with prompt_embeds: None")
        with contextlib.ExitStack() as opened:
            self._folder = Path(tempfile.mkdtemp(prefix="diffmas-", dir=folder))
            opened.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._store = TraceStore(self._folder / "traces", max_bytes=max_trace_bytes)
            self._model = fingerprint(system)
            name = running_adapter(system)
            self._adapter = None if name is None else write_adapter(system, name, self._folder)
            dtype = str(system.agent_model.language_model.dtype).removeprefix("torch.")
            source = EngineSource(
                model or write_base(system, self._tokenizer, self._folder / "base"),
                self._model,
                dtype,
                None if prompt_embeds else self._store.folder,
                [self._adapter] if self._adapter else [],
                options,
            )
            stops = stop_ids(system.agent_model, self._tokenizer)
            self._engine = VllmEngine(source, self._tokenizer, stops, entropies=entropies)
            opened.callback(self._engine.close)
            self._opened = opened.pop_all()

    def generate(
        self,
        prompt_ids: Sequence[Tensor],
        prompt_lengths: Sequence[Lengths],
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        *,
        seeds: Sequence[int] | None = None,
        control: Control | None = None,
    ) -> list[list[Completion]]:
        """The last agent's answers, `[row][sample]`; see :class:`diffmas.generation.Engine` for the arguments.

        Without the system's adapter where PEFT has it disabled now.

        Raises:
            ValueError: as :class:`diffmas.generation.Engine` and :meth:`VllmEngine.decode`.
        """
        if self._embedded and control is not None:
            raise ValueError(
                f"control is {control}; allowed with prompt_embeds: None, there is no trace it could act on"
            )
        adapter = self._adapter if running_adapter(self._system) else None
        asked = self._system, prompt_ids, prompt_lengths, decoding
        rows: list[Row] = []
        try:
            if self._embedded:
                rows += embedded_rows(*asked, adapter, seeds=seeds)
            else:
                # One by one: those that are there when another fails are released.
                for row in store_rows(*asked, self._store, self._model, adapter, seeds=seeds, control=control):
                    rows.append(row)
            found = dict(self._engine.decode(rows, decoding))
        finally:
            for row in rows:
                if row.trace is not None:
                    self._store.release(row.trace)
        return [found[index] for index in range(len(rows))]

    def close(self) -> None:
        """End vLLM and remove what was written for it."""
        self._opened.close()

    def __enter__(self) -> VllmDecoder:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
