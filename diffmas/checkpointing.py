"""Activation checkpointing by kind of call, on top of transformers' own layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel

CHECKPOINTING = ("none", "prefill", "all")


class ActivationCheckpointing:
    """Which calls recompute their layers in the backward: none, those that read tokens, or all.

    "none" leaves the model as it is. Otherwise the model's layers are set up for non-reentrant checkpointing, which is
    in force while the model is in training mode; with "prefill" not for latent steps, whose activations are kept.
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
    def for_call(self, *, latent: bool) -> Iterator[None]:
        """In force for a call over latent steps, or over tokens."""
        if self.mode != "prefill" or not latent:
            yield
            return
        for layer in self._layers:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer in self._layers:
                layer.gradient_checkpointing = True
