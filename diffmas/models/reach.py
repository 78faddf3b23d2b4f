"""Whether a decoder's first attention is given what a call needs, and writes keys of the size that is expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from diffmas.models.attention import NAME, UnsupportedModelError
from diffmas.models.decoder_layer import FusedLayer
from diffmas.models.outline import decoder_of, first_layer

_LOOK = f"{NAME}_look"


class _Reached(Exception):
    """The first attention, with what it was given."""

    def __init__(self, key: Tensor, value: Tensor, masked: bool, call: Any):
        super().__init__()
        self.key, self.value, self.masked, self.call = key, value, masked, call


def _look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> None:
    raise _Reached(key, value, attention_mask is not None, kwargs.get("trace_call"))


AttentionInterface.register(_LOOK, _look)


@torch.no_grad()
def check_reach(model: PreTrainedModel, num_kv_heads: int, head_dim: int) -> None:
    """Run `model`, which attends through traces, up to its first attention.

    Raises:
        UnsupportedModelError: an attention that does not get the call or has a mask of its own, or other keys than
            `num_kv_heads` of `head_dim`, and values alike.
    """
    if isinstance(first_layer(model), FusedLayer):
        return
    name = type(model).__name__
    call, ids = object(), torch.zeros(1, 2, dtype=torch.long, device=model.device)
    model.set_attn_implementation(_LOOK)
    try:
        decoder_of(model)(input_ids=ids, use_cache=False, trace_call=call)
    except _Reached as reached:
        key, value = ((x.shape[1], x.shape[3]) for x in (reached.key, reached.value))
        if reached.call is not call:
            raise UnsupportedModelError(
                f"model {name} does not hand keywords down to its attention, where the trace has to arrive "
                "(trace_call); this is not supported"
            ) from None
        if reached.masked:
            raise UnsupportedModelError(
                f"model {name} gives its attention a mask of its own; this is not supported"
            ) from None
        if not key == value == (num_kv_heads, head_dim):
            raise UnsupportedModelError(
                f"model {name} has attention with {key[0]} keys of {key[1]} and {value[0]} values of {value[1]} a "
                f"token; its configuration says {num_kv_heads} of {head_dim}, this is not supported"
            ) from None
    finally:
        model.set_attn_implementation(NAME)
