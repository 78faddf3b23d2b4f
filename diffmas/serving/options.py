"""Which engine decodes, and what it may be told: the same for evaluations and servers."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from typing import Any

#: The engines that answers can be decoded on: our own, and vLLM.
OWN, VLLM = "diffmas", "vllm"
ENGINES = (OWN, VLLM)
#: Arguments of vLLM's engine that are settled by whoever starts it.
SETTLED = (
    "model", "tokenizer", "kv_transfer_config", "enable_prompt_embeds", "enable_lora", "max_lora_rank",
    "lora_target_modules", "skip_tokenizer_init",
)  # fmt: skip


def check_engine(engine: str, engine_args: str | None, trace_dir: str | None, max_trace_gb: float | None) -> None:
    """Raise `ValueError` for an engine there is not, or an argument that it would ignore.

    Raises:
        ModuleNotFoundError: vLLM, where it is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; allowed: {', '.join(ENGINES)}")
    given = {"engine_args": engine_args, "trace_dir": trace_dir, "max_trace_gb": max_trace_gb}
    for name, value in given.items():
        if engine != VLLM and value is not None:
            raise ValueError(f"{name} is {value!r}; allowed: only with --engine {VLLM}")
    engine_options(engine_args)
    if max_trace_gb is not None and not max_trace_gb > 0:
        raise ValueError(f"max_trace_gb is {max_trace_gb}; allowed: > 0")
    if engine == VLLM:
        check_installed()


def engine_options(text: str | None) -> dict[str, Any]:
    """vLLM's engine arguments from a JSON object in text.

    Raises:
        ValueError: anything else, or an argument that is settled elsewhere.
    """
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError:
        options = text
    if not isinstance(options, dict):
        raise ValueError(f'engine_args is {text!r}; allowed: a JSON object, e.g. {{"max_model_len": 4096}}')
    check_options(options)
    return options


def check_options(options: dict[str, Any]) -> None:
    """Raise `ValueError` for an argument of vLLM's engine that is settled elsewhere."""
    if settled := [name for name in options if name in SETTLED]:
        raise ValueError(f"engine options have {settled}, which are settled already; allowed: any other of vLLM's")


def trace_bytes(max_trace_gb: float | None) -> int | None:
    """The most that traces may take, as a store has it."""
    return None if max_trace_gb is None else math.ceil(max_trace_gb * 1e9)


def check_installed() -> None:
    """Raise `ModuleNotFoundError` where there is no vLLM."""
    if find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "vLLM is not installed; allowed: an environment of its own with it (docs/serving.md), or engine 'diffmas'"
        )
