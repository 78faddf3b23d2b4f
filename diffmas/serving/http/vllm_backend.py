"""The senders here, vLLM's own server behind them: it gets a trace's name and decodes, we pass on what it streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from diffmas.generation.engine import stop_ids
from diffmas.serving.http.backends import Found, Job, Piece, Question, Worker, check_question, packed
from diffmas.serving.rows import Row, store_rows
from diffmas.serving.traces import TraceStore
from diffmas.serving.vllm_engine import (
    PLACEHOLDER,
    EngineSource,
    check_length,
    check_probe,
    check_temperature,
    environment,
    sample_seed,
)
from diffmas.serving.weights import Adapter, fingerprint, loadable, running_adapter, write_adapter, write_base
from diffmas.support.leftovers import companion
from diffmas.system import MultiAgentSystem

#: vLLM's server, by the module: its command looks for a distribution that the build for CPUs does not have.
_SERVER = "vllm.entrypoints.openai.api_server"
#: What its base model is called; adapters have their own names.
_BASE = "base"


@contextlib.contextmanager
def on_vllm(
    system: MultiAgentSystem,
    folder: Path,
    options: dict[str, Any],
    max_trace_bytes: int | None = None,
    *,
    most: int = 64,
    together: int = 64,
) -> Iterator[VllmBackend]:
    """A backend on a server of its own, which has started when this gives it.

    Args:
        folder: for traces and weights.
        options: further arguments of vLLM's engine.
        max_trace_bytes: of all traces at once.
        most: questions that may wait or be at work. together: rows whose senders run together.

    Raises:
        ValueError: options that are settled here. RuntimeError: a server that does not start.
    """
    store, name = TraceStore(folder / "traces", max_bytes=max_trace_bytes), running_adapter(system)
    adapter = None if name is None else write_adapter(system, name, folder)
    source = EngineSource(
        loadable(system) or write_base(system, system.tokenizer, folder / "base"),
        fingerprint(system),
        str(system.agent_model.language_model.dtype).removeprefix("torch."),
        store.folder,
        [adapter] if adapter else [],
        options,
    )
    port = _free_port()
    # Nobody but this process is to send it requests.
    with companion(server_command(source, port), environment(server=True)) as process:
        address = f"http://127.0.0.1:{port}"
        _wait(address, process)
        yield VllmBackend(
            system, store, source.fingerprint, adapter, address, _longest(address), most=most, together=together
        )


def server_command(source: EngineSource, port: int) -> list[str]:
    """What starts vLLM's server on `source`."""
    flags = {
        "host": "127.0.0.1", "port": port, "served_model_name": _BASE, "generation_config": "vllm",
        "disable_uvicorn_access_log": True,
    }  # fmt: skip
    words = [sys.executable, "-m", _SERVER]
    for name, value in {**flags, **source.arguments()}.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else [f"--no-{flag[2:]}"]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    if source.adapters:
        words += ["--lora-modules", *(f"{adapter.name}={adapter.folder}" for adapter in source.adapters)]
    return words


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait(address: str, process: Any) -> None:
    while process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"vLLM's server ended with {process.returncode} before it had started; its log says why")


def _longest(address: str) -> int:
    """Tokens of a prompt and its answer that the server takes; of more, it would cut the answer short."""
    models = httpx.get(f"{address}/v1/models", timeout=60).raise_for_status().json()["data"]
    return next(model["max_model_len"] for model in models if model["id"] == _BASE)


class VllmBackend:
    """Questions' senders run here, together; their answers come from vLLM's server.

    Args:
        system: in evaluation mode. model: fingerprint of its base. adapter: what its last agent runs with.
        address: of the server. longest: tokens of a prompt and its answer that it takes.
    """

    def __init__(
        self,
        system: MultiAgentSystem,
        store: TraceStore,
        model: str,
        adapter: Adapter | None,
        address: str,
        longest: int,
        *,
        most: int = 64,
        together: int = 64,
    ):
        self._system, self._store, self._model, self._adapter = system, store, model, adapter
        self._longest = longest
        self._dtype = str(system.agent_model.language_model.dtype).removeprefix("torch.")
        self._stops = sorted(stop_ids(system.agent_model, system.tokenizer))
        unlimited = httpx.Limits(max_connections=None)
        self._address, self._client = address, httpx.AsyncClient(timeout=None, limits=unlimited)
        # Rows that are being decoded, and questions nobody waits for any more, whichever comes first.
        self._rows: dict[Question, Row] = {}
        self._left: weakref.WeakSet[Question] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._worker = Worker(self._run_senders, most, together)

    def check(self, question: Question) -> None:
        """See :class:`~diffmas.serving.http.backends.Backend`."""
        check_question(self._system, question)
        check_temperature(question.decoding)

    async def look(self, call: Callable[[MultiAgentSystem], Found]) -> Found:
        """See :class:`~diffmas.serving.http.backends.Backend`."""
        return await self._worker.between(lambda: call(self._system))

    def healthy(self) -> bool:
        """See :class:`~diffmas.serving.http.backends.Backend`."""
        with contextlib.suppress(httpx.HTTPError):
            return self._worker.alive and httpx.get(f"{self._address}/health", timeout=5).status_code == 200
        return False

    async def close(self) -> None:
        """See :class:`~diffmas.serving.http.backends.Backend`."""
        await asyncio.to_thread(self._worker.close)
        await self._client.aclose()

    def _run_senders(self, jobs: Sequence[Job[Row]]) -> None:
        ids, lengths = packed([job.question for job in jobs])
        seeds = [job.question.decoding.seed for job in jobs]
        rows = store_rows(
            self._system, ids, lengths, jobs[0].kind, self._store, self._model, self._adapter, seeds=seeds
        )  # fmt: skip
        for job, row in zip(jobs, rows, strict=True):
            with self._lock:
                left = job.question in self._left
                if not left:
                    self._rows[job.question] = row
            if left:
                self._release(row)
            job.tell(row)

    def _release(self, row: Row | None) -> None:
        if row is not None and row.trace is not None:
            self._store.release(row.trace)

    async def answer(self, question: Question) -> AsyncGenerator[Piece, None]:
        """See :class:`~diffmas.serving.http.backends.Backend`."""
        try:
            async with contextlib.aclosing(self._worker.told(question)) as told:
                row = await anext(told)
                check_length(row.length, question.decoding, self._longest)
                async with contextlib.aclosing(self._decoded(row, question)) as pieces:
                    async for piece in pieces:
                        yield piece
        finally:
            with self._lock:
                kept = self._rows.pop(question, None)
                self._left.add(question)
            self._release(kept)

    async def _decoded(self, row: Row, question: Question) -> AsyncGenerator[Piece, None]:
        """All samples of a row, each a request of its own: vLLM refuses several greedy ones."""
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        samples = range(question.decoding.samples)
        tasks = [asyncio.create_task(self._sample(row, question, sample, pieces)) for sample in samples]
        unfinished = len(tasks)
        try:
            while unfinished:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise RuntimeError(str(piece)) from piece
                unfinished -= piece.finish is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, row: Row, question: Question, sample: int, pieces: asyncio.Queue) -> None:
        spent, finish = 0, None
        try:
            body = self._request(row, question, sample)
            async with self._client.stream("POST", f"{self._address}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    said = (await response.aread())[:500]
                    raise RuntimeError(f"vLLM's server answers {response.status_code}: {said!r}")
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line[len("data: ") :])
                    if "error" in chunk:
                        raise RuntimeError(f"vLLM's server: {chunk['error'].get('message')}")
                    for choice in chunk["choices"]:
                        if not spent and body["logprobs"] and choice["logprobs"]:
                            (first, *_) = choice["logprobs"]["top_logprobs"]
                            ids = {int(name.rpartition(":")[2]): value for name, value in first.items()}
                            check_probe(row.probe, ids, self._dtype)
                        piece = self._piece(choice, sample, spent)
                        spent, finish = piece.spent, piece.finish
                        pieces.put_nowait(piece)
            if finish is None:
                raise RuntimeError("vLLM's server broke off")
        except (RuntimeError, httpx.HTTPError, ValueError, KeyError) as error:
            pieces.put_nowait(error if isinstance(error, RuntimeError) else RuntimeError(f"vLLM's server: {error!r}"))

    def _piece(self, choice: dict[str, Any], sample: int, before: int) -> Piece:
        tokens, finish = choice["token_ids"] or [], choice["finish_reason"]
        if finish not in (None, "stop", "length"):
            raise RuntimeError(f"vLLM ended the request with {finish!r}; its log says why")
        logprobs = (choice["logprobs"] or {}).get("token_logprobs") or []
        said = [pair for pair in zip(tokens, logprobs, strict=True) if pair[0] not in self._stops]
        own = [token for token, _ in said], [logprob for _, logprob in said]
        return Piece(sample, choice["text"], *own, before + len(tokens), finish)

    def _request(self, row: Row, question: Question, sample: int) -> dict[str, Any]:
        from diffmas.serving.connector import transfer_params

        decoding = question.decoding
        body = {
            "model": _BASE if row.adapter is None else row.adapter.name,
            "prompt": list(row.prompt),
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "seed": sample_seed(decoding.seed, sample),
            "stop": list(decoding.stop),
            "stop_token_ids": self._stops,
            "ignore_eos": True,
            # One of the rows that are read together is looked at: whether vLLM finds the same behind it.
            "logprobs": len(row.probe or ()) if sample == 0 else 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": True,
        }
        if row.trace is None:
            return body
        return body | {
            "prompt": [PLACEHOLDER] * row.trace.length + list(row.prompt),
            "cache_salt": row.trace.cache_salt,
            "kv_transfer_params": transfer_params(row.trace),
        }
