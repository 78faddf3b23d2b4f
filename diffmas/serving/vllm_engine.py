"""vLLM as a decoding engine for rows whose senders have run; written for vLLM 0.32."""

from __future__ import annotations

import os
import time
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from diffmas.generation.decoding import Completion, Decoding
from diffmas.generation.text import cut, decode
from diffmas.serving.options import check_installed, check_options
from diffmas.serving.rows import Row
from diffmas.serving.weights import Adapter
from diffmas.support.progress import announced

#: A token that stands in the place of a column; whichever it is, nothing reads it.
PLACEHOLDER = 0
#: Below this vLLM takes another temperature than it is told.
_LOWEST_TEMPERATURE = 0.01
#: How far the probe's log-probabilities may be apart; the least accurate dtype rounds a logit by some 2^-8 of its size.
_APART = {"float32": 1e-2, "float16": 0.25, "bfloat16": 1.0}


#: Of the environment, where nothing else is set: what vLLM needs on a CPU, that no process of it outlives this one or
#: is forked from its threads, and that it keeps to itself.
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def environment(*, server: bool = False) -> dict[str, str]:
    """What vLLM is to find there, in this process before it is imported, or as a `server` of its own."""
    found = {**_ENVIRONMENT, **os.environ}
    if server and "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ:
        # Its server is made of several processes.
        del found["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return found


def sample_seed(seed: int, sample: int) -> int:
    """Of vLLM's generator: samples and rows whose seeds are neighbours share no draws."""
    (drawn,) = np.random.SeedSequence((seed, sample)).generate_state(1, np.uint64)
    return int(drawn >> np.uint64(1))


def check_temperature(decoding: Decoding) -> None:
    """Raise `ValueError` for a temperature in place of which vLLM takes another."""
    if 0 < decoding.temperature < _LOWEST_TEMPERATURE:
        raise ValueError(
            f"temperature is {decoding.temperature}; allowed with vLLM: 0, or ≥ {_LOWEST_TEMPERATURE}, below which it "
            "takes another"
        )


def check_length(length: int, decoding: Decoding, most: int) -> None:
    """Raise `ValueError` where vLLM would cut answers behind `length` tokens short: it takes `most` altogether."""
    if length + decoding.max_new_tokens > most:
        raise ValueError(
            f"max_new_tokens is {decoding.max_new_tokens} behind {length} columns and prompt tokens, and vLLM's "
            f"max_model_len is {most}; allowed: up to {max(0, most - length)}"
        )


def check_probe(probe: Mapping[int, float], found: Mapping[int, float], dtype: str) -> None:
    """Raise `ValueError` where vLLM finds other log-probabilities of a first token than we did."""
    token, expected = max(probe.items(), key=lambda pair: pair[1])
    actual = found.get(token)
    if actual is None or not abs(actual - expected) <= _APART[dtype]:
        raise ValueError(
            f"vLLM gives token {token} the log-probability {actual}, this package {expected:.4f}, behind the same "
            "trace and prompt: it computes something else; allowed: a model that both compute alike"
        )


@dataclass(frozen=True)
class EngineSource:
    """What an engine is started on.

    Attributes:
        model: folder or hub name of the base model. fingerprint: of its weights.
        dtype: of weights and traces, e.g. "float32".
        traces: the folder of traces; None: rows come as input embeddings, and need no connector.
        adapters: all that rows will ask for.
        options: further arguments of vLLM's engine, e.g. `{"tensor_parallel_size": 2}`.
    """

    model: str
    fingerprint: str
    dtype: str
    traces: str | Path | None
    adapters: Sequence[Adapter] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """vLLM's engine arguments.

        Raises:
            ValueError: an option that is settled here.
        """
        check_options(self.options)
        # One process needs no other.
        alone = self.options.get("tensor_parallel_size", 1) == 1
        lora: dict[str, Any] = {}
        if self.adapters:
            # No other module: an embedding that could have an adapter fails where rows come as embeddings (on a CPU).
            targets = sorted({name for adapter in self.adapters for name in adapter.targets})
            lora = {"enable_lora": True, "max_lora_rank": _rank(self.adapters), "lora_target_modules": targets}
        if self.traces is None:
            given: dict[str, Any] = {"enable_prompt_embeds": True}
        else:
            from diffmas.serving.connector import transfer_config

            given = {"kv_transfer_config": transfer_config(self.traces, self.fingerprint)}
        return {
            "model": self.model,
            "dtype": self.dtype,
            **given,
            "disable_log_stats": True,
            **({"distributed_executor_backend": "uni"} if alone else {}),
            **lora,
            **self.options,
        }


def _rank(adapters: Sequence[Adapter]) -> int:
    """The least rank that vLLM has room for, of those that hold all adapters."""
    from vllm.config.lora import MaxLoRARanks

    needed, ranks = max(a.rank for a in adapters), typing.get_args(MaxLoRARanks)
    if needed > max(ranks):
        raise ValueError(f"the adapter has rank {needed}; allowed in vLLM: up to {max(ranks)}")
    return min(rank for rank in ranks if rank >= needed)


class VllmEngine:
    """Decodes rows; one engine at a time in a process.

    Greedy answers are those of :func:`diffmas.generation.generate` in float32. Sampled ones come from vLLM's generator:
    the same seeds give the same answers, which are not our engine's. Log-probabilities are those of the model, before
    temperature and nucleus, as ours.

    Args:
        source: what it runs on.
        tokenizer: of the answers.
        stop_ids: tokens that end an answer.
        entropies: of every token's distribution, for which vLLM hands over the log-probabilities of the whole
            vocabulary. Without, completions have none.

    Raises:
        ModuleNotFoundError: no vLLM. ValueError: options that vLLM refuses.
    """

    def __init__(
        self,
        source: EngineSource,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int],
        *,
        entropies: bool = False,
    ):
        check_installed()
        os.environ.update(environment())
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._source, self._tokenizer, self._stops = source, tokenizer, sorted(set(stop_ids))
        self._entropies, self._count = entropies, 0
        self._numbers = {adapter.name: n for n, adapter in enumerate(source.adapters, 1)}
        arguments = source.arguments() | ({"max_logprobs": -1} if entropies else {})
        try:
            given = EngineArgs(**arguments)
        except TypeError as error:
            raise ValueError(f"engine options are {dict(source.options)}: {error}; allowed: vLLM's") from None
        with announced("starting vLLM"):
            self._engine = LLMEngine.from_engine_args(given)
        self._longest = self._engine.model_config.max_model_len

    def decode(self, rows: Sequence[Row], decoding: Decoding) -> Iterator[tuple[int, list[Completion]]]:
        """Each row's index and its samples' completions, as rows are done; whoever stops early leaves nothing running.

        Raises:
            ValueError: rows longer than the engine takes, a temperature it would change, or a probe it disagrees with.
            RuntimeError: a request that vLLM could not answer.
        """
        self._check(rows, decoding)
        groups: dict[str | None, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.adapter.name if row.adapter else None, []).append(index)
        # One after the other: on a CPU, vLLM takes a request without an adapter beside one that has one for the same.
        for indices in groups.values():
            for index in indices:
                if rows[index].probe is not None:
                    self._check_probe(rows[index])
            yield from self._decode(rows, indices, decoding)

    def _decode(
        self, rows: Sequence[Row], indices: Sequence[int], decoding: Decoding
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Those of `rows` with one adapter, or with none."""
        running: dict[str, tuple[int, int]] = {}
        started, done = time.perf_counter(), {index: {} for index in indices}
        # Greedy samples are one answer.
        samples = decoding.samples if decoding.temperature else 1
        try:
            for index in indices:
                for sample in range(samples):
                    running[self._add(rows[index], self._sampling(rows[index], decoding, sample))] = index, sample
            while running:
                for output in self._engine.step():
                    if not output.finished:
                        continue
                    index, sample = running.pop(output.request_id)
                    seconds = rows[index].seconds + time.perf_counter() - started
                    done[index][sample] = self._completion(output.outputs[0], decoding, seconds)
                    if len(done[index]) == samples:
                        found = done.pop(index)
                        yield index, [found[s % samples] for s in range(decoding.samples)]
        finally:
            if running:
                self._engine.abort_request(list(running))

    def close(self) -> None:
        """End the processes that vLLM has started, and give back its memory."""
        self._engine.engine_core.shutdown()

    def _check(self, rows: Sequence[Row], decoding: Decoding) -> None:
        check_temperature(decoding)
        self._check_handed_over(rows)
        check_length(max((row.length for row in rows), default=0), decoding, self._longest)
        if unknown := {row.adapter.name for row in rows if row.adapter} - self._numbers.keys():
            raise ValueError(f"adapters are {sorted(unknown)}; allowed: those it was started with, {[*self._numbers]}")

    def _check_handed_over(self, rows: Sequence[Row]) -> None:
        embedded, hidden = self._source.traces is None, self._engine.model_config.get_inputs_embeds_size()
        for row in rows:
            if (row.trace if embedded else row.embeddings) is not None:
                found, allowed = ("traces", "embeddings") if embedded else ("embeddings", "traces")
                raise ValueError(f"rows have {found}; allowed: {allowed}, which the engine was started for")
            if (x := row.embeddings) is not None and (x.ndim != 2 or x.shape[1] != hidden):
                raise ValueError(
                    f"embeddings are {tuple(x.shape)}; allowed: [columns, {hidden}], as the model has them"
                )

    def _check_probe(self, row: Row) -> None:
        from vllm import SamplingParams

        request = SamplingParams(
            max_tokens=1, temperature=0, logprobs=len(row.probe), detokenize=False, extra_args=_extra(row)
        )
        self._add(row, request)
        outputs = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        found = _answered(outputs[-1].outputs[0]).logprobs[0]
        check_probe(row.probe, {token: entry.logprob for token, entry in found.items()}, self._source.dtype)

    def _sampling(self, row: Row, decoding: Decoding, sample: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            seed=sample_seed(row.seed, sample),
            stop=list(decoding.stop) or None,
            stop_token_ids=self._stops,
            ignore_eos=True,
            logprobs=-1 if self._entropies else 0,
            detokenize=bool(decoding.stop),
            extra_args=_extra(row),
        )

    def _add(self, row: Row, sampling: Any) -> str:
        from vllm.lora.request import LoRARequest

        name, self._count = str(self._count), self._count + 1
        prompt: dict[str, Any] = {"prompt_token_ids": list(row.prompt)}
        if row.embeddings is not None:
            prompt = {"prompt_embeds": row.embeddings}
        elif row.trace is not None:
            prompt["prompt_token_ids"] = [PLACEHOLDER] * row.trace.length + prompt["prompt_token_ids"]
            prompt["cache_salt"] = row.trace.cache_salt
        adapter = row.adapter and LoRARequest(row.adapter.name, self._numbers[row.adapter.name], row.adapter.folder)
        self._engine.add_request(name, prompt, sampling, lora_request=adapter)
        return name

    def _completion(self, output: Any, decoding: Decoding, seconds: float) -> Completion:
        tokens = list(_answered(output).token_ids)
        logprobs = [float(found[token].logprob) for token, found in zip(tokens, output.logprobs, strict=True)]
        entropies = [_entropy(found) for found in output.logprobs] if self._entropies else []
        tokens = tokens[:-1] if tokens and tokens[-1] in self._stops else tokens
        text = cut(decode(self._tokenizer, tokens), decoding.stop)
        return Completion(tokens, text, logprobs, entropies, output.finish_reason, seconds)


def _answered(output: Any) -> Any:
    """`output` itself.

    Raises:
        RuntimeError: one that was not answered.
    """
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {output.finish_reason!r}; its log says why")
    return output


def _extra(row: Row) -> dict[str, Any] | None:
    from diffmas.serving.connector import transfer_params

    return None if row.trace is None else {"kv_transfer_params": transfer_params(row.trace)}


def _entropy(found: Mapping[int, Any]) -> float:
    logprobs = np.array([entry.logprob for entry in found.values()])
    logprobs = logprobs[np.isfinite(logprobs)]
    return float(-(np.exp(logprobs) * logprobs).sum())
