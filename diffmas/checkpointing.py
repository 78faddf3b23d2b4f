"""Activation checkpointing by kind of call, on top of transformers' own layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel

CHECKPOINTING = ("none", "prefill", "all")


class ActivationCheckpointing:
    """Which calls recompute their layers in the backward: none, those of more than one token a row, or all.

    "none" leaves the model as it is. Otherwise the model's layers are set up for non-reentrant checkpointing, which
    is in force while the model is in training mode.
    """

    def __init__(self, model: PreTrainedModel, mode: str):
        if mode not in CHECKPOINTING:
            raise ValueError(f"checkpointing is {mode!r}; allowed: {', '.join(CHECKPOINTING)}")
        self.mode = mode
        self._layers = []
        if mode != "none":
            # transformers renamed it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            self._layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]

    @contextlib.contextmanager
    def for_call(self, max_new: int) -> Iterator[None]:
        """In force for a call of up to `max_new` tokens a row."""
        if self.mode != "prefill" or max_new > 1:
            yield
            return
        for layer in self._layers:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer in self._layers:
                layer.gradient_checkpointing = True
