"""What vLLM loads to put a trace in front of a request's own prompt: a KV connector, written for vLLM 0.32.

A request's prompt begins with as many placeholder tokens as its trace has columns. The scheduler's side says that they
are computed already; the worker's side writes their keys and values, through each attention layer's own update of its
cache, so that it need not know how that is laid out. What does not fit fails its request, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from diffmas.serving.traces import Layout, StoredTrace, TraceStore, cache_salt, check_id, read_trace

#: Where vLLM finds it, and what a request's `kv_transfer_params` call a trace and its length.
MODULE, CLASS = "diffmas.serving.connector", "TraceConnector"
_TRACE, _COLUMNS = "trace", "columns"

_logger = init_logger("vllm.diffmas")


def transfer_config(folder: str | Path, model: str) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` for traces in `folder` that the model with fingerprint `model` wrote."""
    return {
        "kv_connector": CLASS,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"folder": str(folder), "model": model},
    }


def transfer_params(trace: StoredTrace) -> dict[str, Any]:
    """A request's `kv_transfer_params`; its `cache_salt` is the trace's."""
    return {_TRACE: trace.id, _COLUMNS: trace.length}


@dataclass
class _Load:
    """Columns `begin … columns - 1` of a trace, and the blocks of the request they go to.

    `refused`: why they do not.
    """

    trace: str
    columns: int
    begin: int
    blocks: list[int]
    refused: str | None = None


@dataclass
class _Loads(KVConnectorMetadata):
    """Those of one step."""

    loads: list[_Load] = field(default_factory=list)


class TraceConnector(KVConnectorBase_V1):
    """See the module. `kv_connector_extra_config`: `folder` of the traces, `model`, the fingerprint of theirs."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._store, self._model = TraceStore(given["folder"]), given["model"]
        self._block_size = vllm_config.cache_config.block_size
        _check_supported(vllm_config, kv_cache_config)
        self._planned: list[_Load] = []
        self._failed: set[int] = set()
        self._layers: list[Any] | None = None
        self._layout: Layout | None = None

    # The scheduler's side.

    def on_new_request(self, request: Any) -> None:
        """Let a request that has to fail be asked for its computed tokens, which is where it fails."""
        if (params := _asked(request)) is not None and _refusal(request, params):
            request.skip_reading_prefix_cache = False

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """What of the trace vLLM's prefix cache does not hold already."""
        if (params := _asked(request)) is None:
            return 0, False
        columns = params.get(_COLUMNS) if _refusal(request, params) is None else request.num_prompt_tokens - 1
        return max(0, columns - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load that this step's forward needs."""
        if (params := _asked(request)) is None:
            return
        refused = _refusal(request, params)
        if num_external_tokens or refused:
            (ids,) = blocks.get_block_ids()
            columns = 0 if refused else params[_COLUMNS]
            begin = columns - num_external_tokens
            self._planned.append(_Load(str(params.get(_TRACE)), columns, begin, list(ids), refused))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """This step's loads."""
        planned, self._planned = self._planned, []
        return _Loads(planned)

    # The worker's side.

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Find the attention layers in their order, and what a trace has to be like."""
        config = self._vllm_config
        there = config.compilation_config.static_forward_context
        names = sorted(kv_caches, key=extract_layer_index)
        self._layers = [there[name] for name in names]
        heads = config.model_config.get_total_num_kv_heads()
        shapes = tuple((heads, layer.head_size) for layer in self._layers)
        self._layout = Layout(self._model, shapes, config.model_config.dtype)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write the planned columns into the layers' caches."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, _Loads)
        for load in metadata.loads:
            try:
                if load.refused is not None:
                    raise ValueError(load.refused)
                self._load(load)
            except (ValueError, OSError) as error:
                _logger.error("a request fails: %s", error)
                self._failed.update(load.blocks)

    def _load(self, load: _Load) -> None:
        _, stacks = read_trace(self._store.path(load.trace), load.columns, self._layout)
        at = torch.arange(load.begin, load.columns)
        blocks = torch.tensor(load.blocks)[at // self._block_size]
        slots = blocks * self._block_size + at % self._block_size
        parallel = self._vllm_config.parallel_config
        for layer, stack in zip(self._layers, stacks, strict=True):
            own = own_heads(stack.keys.shape[1], parallel.tensor_parallel_size, _rank(parallel))
            device = layer.kv_cache.device
            keys, values = (x[load.begin :, own].contiguous().to(device) for x in stack)
            layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots.to(device))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose requests have to fail."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything is loaded before the forward begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def own_heads(heads: int, processes: int, rank: int) -> slice:
    """Those of `heads` key/value heads that process `rank` of `processes` keeps; where they are fewer, they repeat."""
    if heads >= processes:
        each = heads // processes
        return slice(rank * each, (rank + 1) * each)
    return slice(rank * heads // processes, rank * heads // processes + 1)


def _rank(parallel: Any) -> int:
    return parallel.rank % parallel.tensor_parallel_size


def _asked(request: Any) -> Mapping[str, Any] | None:
    """A request's parameters, where it has a trace."""
    params = request.kv_transfer_params
    return params if params and _TRACE in params else None


def _refusal(request: Any, params: Mapping[str, Any]) -> str | None:
    """Why a request must not be answered; None: it may."""
    columns, most = params.get(_COLUMNS), request.num_prompt_tokens - 1
    try:
        trace_id = check_id(params[_TRACE])
    except ValueError as error:
        return str(error)
    if not isinstance(columns, int) or not 1 <= columns <= most:
        return f"columns is {columns!r}; allowed: 1 to {most}, the prompt's tokens but for the last"
    if request.cache_salt != (salt := cache_salt(trace_id)):
        return f"cache_salt is {request.cache_salt!r}; allowed: {salt!r}, or another row's blocks would be taken"
    sampling = request.sampling_params
    if sampling is None or sampling.prompt_logprobs is not None or sampling.skip_reading_prefix_cache:
        return (
            "the request has prompt_logprobs or skip_reading_prefix_cache, with which vLLM would read the placeholders "
            "in place of the trace; allowed: neither"
        )
    return None


def _check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raise `ValueError` for an engine whose caches a trace cannot be written to."""
    wrong: Sequence[tuple[str, Any, Any]] = [
        ("pipeline_parallel_size", vllm_config.parallel_config.pipeline_parallel_size, 1),
        ("kv_cache_dtype", vllm_config.cache_config.cache_dtype, "auto"),
        ("decode_context_parallel_size", vllm_config.parallel_config.decode_context_parallel_size, 1),
        ("the number of KV cache groups", len(kv_cache_config.kv_cache_groups), 1),
    ]
    for name, value, allowed in wrong:
        if value != allowed:
            raise ValueError(f"{name} is {value}; allowed with traces: {allowed}")
