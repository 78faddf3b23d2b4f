"""What the decoder layers that run as one operation are made of, by the name of their class.

Layers not named here run as their own modules do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerParts:
    """Of a layer with `self_attn` (q_proj, k_proj, v_proj, o_proj) and `mlp` (gate_proj, up_proj, down_proj, act_fn).

    Attributes:
        before: the layer's norms in front of attention and MLP.
        head_norms: the attention's norms of queries and keys; none: they are taken as they are.
        epsilon: a norm's attribute for it.
        rotates: the attention's attribute that says whether its heads are turned; None: they always are.
    """

    before: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    epsilon: str = "variance_epsilon"
    rotates: str | None = None


_PLAIN = LayerParts()

LAYERS: Mapping[str, LayerParts] = {
    "LlamaDecoderLayer": _PLAIN,
    "MinistralDecoderLayer": _PLAIN,
    "MistralDecoderLayer": _PLAIN,
    "Qwen2DecoderLayer": _PLAIN,
    "Qwen3DecoderLayer": replace(_PLAIN, head_norms=("q_norm", "k_norm")),
    "SmolLM3DecoderLayer": replace(_PLAIN, rotates="use_rope"),
}
