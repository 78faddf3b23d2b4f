"""Looking at a transformers model from outside: decoder, embedding, first layer; a forward in another's place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from diffmas.models.errors import UnsupportedModelError


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """With `forward` in the place of the module's own."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """What makes the hidden states that the head takes: not every causal language model names it to transformers."""
    decoder = model.get_decoder()
    return getattr(model, "model", model) if decoder is model else decoder


def input_embedding(model: PreTrainedModel) -> Any:
    """The module that tokens enter `model` through.

    Raises:
        UnsupportedModelError: a model that names none.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if embedding is None:
        raise UnsupportedModelError(
            f"model {type(model).__name__} names no input embedding (get_input_embeddings); latent steps go around it"
        )
    if (weight := getattr(embedding, "weight", None)) is not None and weight.device.type == "meta":
        raise UnsupportedModelError(
            f"the input embedding of model {type(model).__name__} is on the meta device (offloaded, or never loaded); "
            "allowed: on a device"
        )
    return embedding


def attend_with(model: PreTrainedModel, name: str) -> None:
    """Set the model's attention implementation, in copies of its configuration too.

    A layer that was copied whole, such as an adapter's `modules_to_save`, has its own.
    """
    model.set_attn_implementation(name)
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and hasattr(module, "layer_idx"):
            config._attn_implementation = name


def first_layer(model: PreTrainedModel) -> nn.Module | None:
    """The first of the decoder's layers: of its list of modules, whatever that is called."""
    lists = [child for child in decoder_of(model).children() if isinstance(child, nn.ModuleList) and len(child)]
    return lists[0][0] if lists else None
