"""How a transformers decoder reads and writes our traces: its attention function, and what we refuse.

A forward gets the call as the keyword `trace_call` and its layers' geometry as `trace_layers`; transformers hands both
down to the attention function, through PEFT and through its own (non-reentrant) activation checkpointing.
`past_key_values` is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from diffmas.models.errors import UnsupportedModelError
from diffmas.models.fingerprint import made_of
from diffmas.models.geometry import LayerGeometry, geometry_of
from diffmas.models.keywords import carried
from diffmas.models.outline import attend_with
from diffmas_ops import Call, cached_attention

NAME = "diffmas"
#: Where a model keeps what it was made of when its layers were looked at, and what they are.
_LAYERS = "trace_layers"


def trace_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    trace_call: Call | None = None,
    trace_layers: Mapping[int, LayerGeometry] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers attention function: `query [1, heads, total, head_dim]` to `[1, total, heads, value_dim]`."""
    if trace_call is None:
        trace_call, trace_layers = carried("trace_call"), carried("trace_layers")
    if trace_call is None or trace_layers is None:
        raise ValueError("trace_call is None; this model attends through a trace: call it via MultiAgentSystem")
    if attention_mask is not None:
        raise ValueError("attention_mask is given; allowed: None, packed inputs need no mask")
    if dropout:
        raise ValueError(f"attention dropout is {dropout}; allowed: 0")
    layer, dtype = trace_layers[cast(int, module.layer_idx)], trace_call.storage.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    q, k = (_fit(x, layer) for x in (_by_position(q, module, trace_call), k))
    out = cached_attention(
        q, k, v, trace_call, layer=layer.slot, softmax_scale=scale, window=layer.window, chunk=layer.chunk,
        softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return out.unsqueeze(0), None


def _by_position(q: Tensor, module: nn.Module, call: Call) -> Tensor:
    """Llama 4's queries without rotation, which it scales by their place in a forward, scaled by their position."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return q
    attention = cast(Any, module)
    places = torch.arange(len(q), device=q.device)
    # In float32, as the model does it.
    used, right = (
        torch.log1p(torch.floor((at.float() + 1.0) / attention.floor_scale)) * attention.attn_scale + 1.0
        for at in (places, call.position_ids[0])
    )
    # No comparison: it would wait for a device. Where both are the same, this is a product with 1.
    return q * (right.double() / used.double()).to(q.dtype)[:, None, None]


def _fit(x: Tensor, layer: LayerGeometry) -> Tensor:
    """Queries or keys as a trace keeps them: dims that turn in front, zeros behind where values are larger."""
    if layer.offset:
        x = x.roll(-layer.offset, -1)
    return F.pad(x, (0, layer.head_dim - x.shape[-1])) if x.shape[-1] < layer.head_dim else x


AttentionInterface.register(NAME, trace_attention)


def _has(model: PreTrainedModel, name: str) -> bool:
    """Whether a module in it is called `name`."""
    return any(path.rpartition(".")[2] == name for path, _ in model.named_modules())


def _attends(model: PreTrainedModel) -> bool:
    return any(hasattr(m, "layer_idx") and "Attention" in type(m).__name__ for m in model.modules())


def attach(model: PreTrainedModel, made: str | None = None) -> dict[int, LayerGeometry]:
    """Make `model` (a decoder-only language model) attend through traces; its attention layers by `layer_idx`.

    `made`: what it is made of, where that is known already.

    Raises:
        UnsupportedModelError: an encoder-decoder, ALiBi, a class outside transformers' attention interface, or what
            :func:`~diffmas.models.geometry.geometry_of` refuses.
    """
    config = model.config.get_text_config(decoder=True)
    refused = {
        "an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "ALiBi positions (alibi)": getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"),
        "sparse attention, whose keys an indexer chooses (index_topk)": _has(model, "indexer"),
        "recurrent layers and no attention": model._is_stateful and not _attends(model),
    }
    for what, present in refused.items():
        if present:
            raise UnsupportedModelError(f"model {type(model).__name__} has {what}; this is not supported")
    # Another system on the same model finds what the first one did.
    made, (before, layers) = made or made_of(model), vars(model).get(_LAYERS, (None, {}))
    if made != before:
        layers = geometry_of(model)
        vars(model)[_LAYERS] = (made, layers)
    attend_with(model, NAME)
    return layers
