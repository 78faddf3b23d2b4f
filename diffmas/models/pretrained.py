"""A causal language model and its tokenizer, from a folder or the hub."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from diffmas.embedded import embedded_path
from diffmas.models.gguf import dequantised, gguf_of
from diffmas.models.source import check_source
from diffmas.models.wrapper import load_unwrapped, needs_unwrapping, text_config
from diffmas.support.failures import reading
from diffmas.support.quiet import quiet_loading

QUANTIZATIONS = ("none", "4bit")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_base(
    name_or_path: str | None = None,
    *,
    gguf_file: str | None = None,
    dtype: str = "auto",
    quantization: str = "none",
    random_weights: bool = False,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The base model and its tokenizer; of a model for more than text, its text decoder.

    Args:
        name_or_path: of a folder, a GGUF file or the hub, "smollm2", or the name of an embedded base; None: the first
            of these.
        gguf_file: name of the GGUF file in the folder or repository that holds the model.
        dtype: of its weights, one of :data:`DTYPES`; "auto": the checkpoint's, of a GGUF file float32.
        quantization: of its linear layers, one of :data:`QUANTIZATIONS`.
        random_weights: take only its configuration and tokenizer.

    Raises:
        ValueError: an unknown dtype or quantization. OSError: a model that cannot be found.
        ModuleNotFoundError: a quantization without bitsandbytes, a GGUF file without what reads it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {quantization!r}; allowed: {', '.join(QUANTIZATIONS)}")
    check_source(name_or_path, gguf_file)
    source = embedded_path(name_or_path) or name_or_path
    kind = None if dtype == "auto" else cast(torch.dtype, getattr(torch, dtype))
    with reading(f"model {name_or_path or 'embedded base'}"):
        if (found := gguf_of(name_or_path, gguf_file)) is not None:
            source = dequantised(*found, kind if kind in (torch.bfloat16, torch.float16) else torch.float32)
        config = AutoConfig.from_pretrained(source)
        if quantization != "none":
            if random_weights:
                raise ValueError(f"quantization is {quantization!r} with random_weights; allowed: none")
            model = _load_quantized(source, config, kind or torch.bfloat16)
        elif random_weights:
            model = AutoModelForCausalLM.from_config(text_config(config))
            model = model if kind is None else model.to(kind)
        else:
            model = _load(source, config, dtype=kind or "auto")
        if found is not None:
            model.config.gguf_source = [name_or_path, gguf_file]
        return model, AutoTokenizer.from_pretrained(source)


def load_tokenizer(name_or_path: str | None = None, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone; see :func:`load_base`."""
    check_source(name_or_path, gguf_file)
    source = embedded_path(name_or_path) or name_or_path
    with reading(f"model {name_or_path or 'embedded base'}"):
        if (found := gguf_of(name_or_path, gguf_file)) is not None:
            source = dequantised(*found, torch.float32)
        return AutoTokenizer.from_pretrained(source)


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
