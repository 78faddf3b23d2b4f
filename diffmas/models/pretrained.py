"""A causal language model and its tokenizer, from a folder or the hub."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from diffmas.embedded import EMBEDDED_PATH
from diffmas.models.source import check_source
from diffmas.models.wrapper import load_unwrapped, needs_unwrapping, text_config
from diffmas.support.failures import reading
from diffmas.support.quiet import quiet_loading

QUANTIZATIONS = ("none", "4bit")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_base(
    name_or_path: str | None = None, *, dtype: str = "auto", quantization: str = "none", random_weights: bool = False
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The base model and its tokenizer; of a model for more than text, its text decoder.

    Args:
        name_or_path: of a folder or the hub; None: the embedded base.
        dtype: of its weights, one of :data:`DTYPES`; "auto": the checkpoint's.
        quantization: of its linear layers, one of :data:`QUANTIZATIONS`.
        random_weights: take only its configuration and tokenizer.

    Raises:
        ValueError: an unknown dtype or quantization. OSError: a model that cannot be found.
        ModuleNotFoundError: a quantization without bitsandbytes.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {quantization!r}; allowed: {', '.join(QUANTIZATIONS)}")
    check_source(name_or_path)
    source, kind = name_or_path or EMBEDDED_PATH, dtype if dtype == "auto" else getattr(torch, dtype)
    with reading(f"model {name_or_path or 'embedded base'}"):
        config = AutoConfig.from_pretrained(source)
        if quantization != "none":
            if random_weights:
                raise ValueError(f"quantization is {quantization!r} with random_weights; allowed: none")
            model = _load_quantized(source, config, torch.bfloat16 if dtype == "auto" else kind)
        elif random_weights:
            model = AutoModelForCausalLM.from_config(text_config(config))
            model = model if dtype == "auto" else model.to(kind)
        else:
            model = _load(source, config, dtype=kind)
    return model, load_tokenizer(name_or_path)


def load_tokenizer(name_or_path: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone; see :func:`load_base`."""
    check_source(name_or_path)
    with reading(f"model {name_or_path or 'embedded base'}"):
        return AutoTokenizer.from_pretrained(name_or_path or EMBEDDED_PATH)


def _load(source: str, config: PreTrainedConfig, **options: Any) -> torch.nn.Module:
    with quiet_loading():
        if needs_unwrapping(config):
            return load_unwrapped(source, config, **options)
        return AutoModelForCausalLM.from_pretrained(source, **options)


def _load_quantized(source: str, config: PreTrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    """Linear layers in 4 bits (NF4, QLoRA, arXiv 2305.14314); what they compute in, and all else, is `dtype`."""
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("quantization is '4bit', which needs bitsandbytes: pip install bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    device = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
    return _load(source, config, dtype=dtype, quantization_config=quantization, device_map=device)
