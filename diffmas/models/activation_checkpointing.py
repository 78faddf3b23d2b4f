"""Activation checkpointing by kind of call, on top of transformers' own layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel

CHECKPOINTING = ("none", "prefill", "all")


class ActivationCheckpointing:
    """Which calls recompute their layers in the backward: none, those that read tokens, or all.

    "none" leaves the model as it is. The first other mode sets the model's layers up for non-reentrant checkpointing,
    which is in force while the model is in training mode; with "prefill" not for latent steps, whose activations are
    kept. `mode` may change between trajectories.
    """

    def __init__(self, model: PreTrainedModel, mode: str):
        self._model, self._layers = model, []
        self.mode = mode

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in CHECKPOINTING:
            raise ValueError(f"checkpointing is {mode!r}; allowed: {', '.join(CHECKPOINTING)}")
        self._mode = mode
        if mode != "none" and not self._layers:
            # transformers renamed it.
            model = self._model
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            self._layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]

    @contextlib.contextmanager
    def for_call(self, *, latent: bool) -> Iterator[None]:
        """In force for a call over latent steps, or over tokens."""
        keep = self.mode == "none" or (self.mode == "prefill" and latent)
        if not keep:
            yield
            return
        for layer in self._layers:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer in self._layers:
                layer.gradient_checkpointing = True
