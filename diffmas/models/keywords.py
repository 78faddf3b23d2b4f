"""A forward's keywords, for attention in decoders whose layers keep them to themselves."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers import PreTrainedModel

#: Of the layers that are running, the innermost last.
_RUNNING: ContextVar[tuple[dict[str, Any], ...]] = ContextVar("running", default=())


def carry_keywords(model: PreTrainedModel) -> None:
    """Keep what the layers of `model` are given while they run, also when checkpointing runs them again."""
    for child in model.get_decoder().children():
        for layer in child if isinstance(child, nn.ModuleList) else ():
            layer.register_forward_pre_hook(_enter, with_kwargs=True)
            layer.register_forward_hook(_leave, always_call=True)


def carried() -> dict[str, Any]:
    """The keywords of the layer that is running; none outside one, or without :func:`carry_keywords`."""
    running = _RUNNING.get()
    return running[-1] if running else {}


def _enter(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    _RUNNING.set((*_RUNNING.get(), kwargs))


def _leave(layer: nn.Module, args: tuple, output: Any) -> None:
    _RUNNING.set(_RUNNING.get()[:-1])
