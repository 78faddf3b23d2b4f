"""The text decoder of a model that wraps one, such as an image-text model: loaded with it, and taken out of it."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.head import same_logits
from diffmas.models.outline import decoder_of, input_embedding

#: What loading leaves in a model besides its modules.
_LOADED = (
    "generation_config",
    "hf_device_map",
    "hf_quantizer",
    "is_loaded_in_4bit",
    "is_quantized",
    "quantization_method",
)
#: Tokens that the decoder is compared on, and how configurations end the names of those that stand for something else.
_TOKENS, _SPECIAL = 6, ("_token_id", "_token_index", "_token")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Of the causal language model in a model of `config`: its own, unless it wraps one.

    Raises:
        UnsupportedModelError: a wrapper around what is no causal language model.
    """
    text = config.get_text_config(decoder=True)
    if type(text) is type(config) or getattr(config, "is_encoder_decoder", False):
        return config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"model_type is {config.model_type!r}, which wraps {text.model_type!r}; allowed: wrappers of a text model "
            "that transformers has a causal language model of"
        )
    return text


def needs_unwrapping(config: PreTrainedConfig) -> bool:
    """Whether transformers would load a wrapper, or nothing at all, where its text decoder is wanted."""
    text = text_config(config)
    if text is config:
        return False
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]


def check_unwrapped(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` where `model` holds more than a text decoder: it would be adapted and saved too."""
    text = model.config.get_text_config(decoder=True)
    if type(text) is not type(model.config) and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"model {type(model).__name__} wraps a text decoder; allowed: that decoder, from its name or folder or by "
            "diffmas.models.wrapper.unwrapped(model)"
        )


def load_unwrapped(source: str, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The text decoder in the checkpoint of a wrapper; what else is in it is let go.

    Args:
        options: of `from_pretrained`.

    Raises:
        UnsupportedModelError: a decoder whose logits are not those of the wrapper.
    """
    wrapper = AutoModelForImageTextToText.from_pretrained(source, config=config, **options)
    return unwrapped(wrapper)


@torch.no_grad()
def unwrapped(wrapper: PreTrainedModel) -> PreTrainedModel:
    """The causal language model of the text decoder in `wrapper`, made of the wrapper's own modules."""
    config = text_config(wrapper.config)
    config._name_or_path = wrapper.config._name_or_path
    decoder, head = wrapper.get_decoder(), wrapper.get_output_embeddings()
    if type(decoder) in MODEL_FOR_CAUSAL_LM_MAPPING.values():  # some have a whole language model inside
        decoder = decoder_of(decoder)
    config.tie_word_embeddings = head.weight is input_embedding(wrapper).weight
    kind = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    with torch.device("meta"):
        model = kind(config)
    empty = decoder_of(model)
    if type(empty) is not type(decoder):
        raise UnsupportedModelError(
            f"model {type(wrapper).__name__} has a {type(decoder).__name__}, which is not the decoder of a "
            f"{kind.__name__}; this is not supported"
        )
    model.set_submodule(next(name for name, module in model.named_modules() if module is empty), decoder)
    model.set_output_embeddings(head)
    for name in _LOADED:
        if name in vars(wrapper):
            setattr(model, name, getattr(wrapper, name))
    model.eval()
    special = {v for k, v in vars(wrapper.config).items() if k.endswith(_SPECIAL) and isinstance(v, int)}
    ordinary = [i for i in range(_TOKENS + len(special)) if i not in special][:_TOKENS]
    ids = torch.tensor([ordinary], device=wrapper.device)
    try:
        ours, theirs = (m(input_ids=ids, use_cache=False).logits[0] for m in (model, wrapper.eval()))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"model {type(wrapper).__name__} cannot be compared with the {kind.__name__} in it: {error}"
        ) from error
    if not same_logits(ours, theirs):
        raise UnsupportedModelError(
            f"model {type(wrapper).__name__} gives other logits than the {kind.__name__} in it; this is not supported"
        )
    return model
