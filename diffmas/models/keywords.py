"""A layer's keywords, for modules inside it that are not handed them."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from torch import nn

from diffmas.models.in_place import put_in_front

#: Of the layer that is running; None outside one.
_KEYWORDS: ContextVar[dict[str, Any] | None] = ContextVar("keywords", default=None)


def carry_keywords(layers: Iterable[nn.Module]) -> None:
    """Keep what `layers` are given while they run, also when checkpointing runs them again."""
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = put_in_front(CarryingLayer, kind)


def carried(name: str) -> Any:
    """A keyword of the layer that is running; None without it, or outside the layers of :func:`carry_keywords`."""
    return (_KEYWORDS.get() or {}).get(name)


class CarryingLayer:
    """What :func:`carry_keywords` puts in front of a layer's class."""

    def forward(self, *args, **kwargs):
        token = _KEYWORDS.set(kwargs)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _KEYWORDS.reset(token)
