"""How a transformers decoder reads and writes our traces: its attention function, and what we refuse.

A forward gets the call as the keyword `trace_call`; transformers hands it down to the attention function, through
PEFT and through its own (non-reentrant) activation checkpointing. `past_key_values` is not used.
"""

from __future__ import annotations

import sys
from inspect import unwrap

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from diffmas_ops import Call, Rotary, cached_attention
from diffmas_ops.kv_concat.reference import rotate

NAME = "diffmas"

# Frequencies that do not depend on the sequence length: a key can be re-phased after it was written.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")

#: Kinds of layers that remember (:mod:`diffmas.models.recurrent`), some of them beside attention.
RECURRENT = ("linear_attention", "mamba", "conv", "hybrid")
_FEED_FORWARD = ("mlp", "moe")


class UnsupportedModelError(ValueError):
    """A model with something the trace cannot express; the message names it."""


def trace_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    trace_call: Call | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers attention function: `query [1, heads, total, head_dim]` to `[1, total, heads, head_dim]`."""
    if trace_call is None:
        raise ValueError("trace_call is None; this model attends through a trace: call it via MultiAgentSystem")
    if attention_mask is not None:
        raise ValueError("attention_mask is given; allowed: None, packed inputs need no mask")
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; allowed: 0")
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the model's attention uses {name} = {kwargs[name]}; this is not supported")
    dtype = trace_call.storage.keys.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    out = cached_attention(q, k, v, trace_call, layer=module.layer_idx, softmax_scale=scaling)
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, trace_attention)


def attach(model: PreTrainedModel) -> None:
    """Make `model` (a decoder-only language model) attend through traces.

    Raises:
        UnsupportedModelError: sliding-window or chunked attention, soft-capping, attention sinks, ALiBi, scaled
            logits, attention in several layers, an encoder-decoder, or a class outside transformers' attention
            interface.
    """
    config = model.config.get_text_config(decoder=True)
    refused = {
        "an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "sliding-window attention (sliding_window)": _slides(config),
        "soft-capped attention (attn_logit_softcapping)": getattr(config, "attn_logit_softcapping", None),
        "soft-capped logits (final_logit_softcapping)": getattr(config, "final_logit_softcapping", None),
        "scaled logits (logit_scale)": (getattr(config, "logit_scale", None) or 1) != 1,
        "scaled logits (logits_scaling)": (getattr(config, "logits_scaling", None) or 1) != 1,
        "scaled logits (lm_head_multiplier)": (getattr(config, "lm_head_multiplier", None) or 1) != 1,
        "attention dropout (attention_dropout)": getattr(config, "attention_dropout", 0),
        "ALiBi positions (alibi)": getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"),
        "several attentions under one index (layer_idx)": _shares_keys(model),
        "recurrent layers and no attention": model._is_stateful and not _attentions(model),
        "attention sinks (sinks)": any(name.endswith("sinks") for name, _ in model.named_parameters()),
    }
    for what, present in refused.items():
        if present:
            raise UnsupportedModelError(f"model {type(model).__name__} has {what}; this is not supported")
    # Models with recurrent layers do not say so: it would mean that they can be served, too.
    if not model._supports_attention_backend and not (model._is_stateful and _calls_interface(model)):
        raise UnsupportedModelError(f"model {type(model).__name__} does not use transformers' attention interface")
    model.set_attn_implementation(NAME)


def rotary_of(model: PreTrainedModel) -> Rotary:
    """The model's rotary embedding, for re-phasing keys; its pairing of dimensions is found by trying.

    Raises:
        UnsupportedModelError: no rotary embedding, frequencies that change with the length (dynamic NTK, longrope),
            or a rotation of neither known pairing.
    """
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    inv_freq = getattr(embedding, "inv_freq", None)
    if not isinstance(inv_freq, Tensor):
        raise UnsupportedModelError(f"model {type(model).__name__} has no rotary position embedding (rotary_emb)")
    if (kind := getattr(embedding, "rope_type", "default")) not in _STATIC_ROPE:
        raise UnsupportedModelError(
            f"rope_type is {kind!r}: its frequencies change with the length, so keys cannot be moved; "
            f"allowed: {', '.join(_STATIC_ROPE)}"
        )
    for interleaved in (False, True):
        if _rotates_like(model, embedding, inv_freq, interleaved):
            return Rotary(inv_freq.detach().clone(), interleaved)
    raise UnsupportedModelError(f"model {type(model).__name__} rotates keys in a way that is not supported")


def _slides(config) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind not in ("full_attention", *RECURRENT, *_FEED_FORWARD) for kind in kinds)
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _attentions(model: PreTrainedModel) -> list[nn.Module]:
    """Modules that write keys and values; one that is in several layers, several times."""
    found = model.get_decoder().named_modules(remove_duplicate=False)
    return [m for _, m in found if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]


def _calls_interface(model: PreTrainedModel) -> bool:
    codes = [unwrap(type(m).forward).__code__ for m in _attentions(model)]
    return bool(codes) and all("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def _shares_keys(model: PreTrainedModel) -> bool:
    written = [m.layer_idx for m in _attentions(model)]
    return len(set(written)) < len(written)


@torch.no_grad()
def _rotates_like(model: PreTrainedModel, embedding: nn.Module, inv_freq: Tensor, interleaved: bool) -> bool:
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 1, head_dim, generator=generator).to(inv_freq.device)
    positions = torch.tensor([[3]], device=inv_freq.device)
    try:
        turned = apply(x, x, *embedding(x, positions))[0]
    except (RuntimeError, TypeError, ValueError):
        return False
    angles = 3 * inv_freq.float()
    expected = rotate(x, angles.cos(), angles.sin(), interleaved) * getattr(embedding, "attention_scaling", 1.0)
    return turned.shape == expected.shape and torch.allclose(turned.float(), expected, atol=1e-4)
