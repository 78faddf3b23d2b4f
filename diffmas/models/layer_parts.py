"""What the decoder layers of transformers that run as one operation are made of, by the name of their class.

Layers not named here run as their own modules do, and so does one whose activation is none of :data:`GATES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from transformers.activations import GELUTanh, SiLUActivation


@dataclass(frozen=True)
class LayerParts:
    """Of a layer with `self_attn` (q_proj, k_proj, v_proj, o_proj) and `mlp` (gate_proj, up_proj, down_proj, act_fn).

    Attributes:
        before, behind: the layer's norms in front of attention and MLP, and of their results; none: there are none.
        head_norms: the attention's norms of queries and keys: of each head, or of all together, as large as they are.
        epsilon: a norm's attribute for it. norm_offset: added to a norm's weight.
        rotates: the attention's attribute that says whether its heads are turned; None: they always are.
        softcap: the attention's attribute for it; None: there is none.
        residual_scale: the layer's attribute by which attention and MLP are multiplied before they are added; None: 1.
    """

    before: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    behind: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    epsilon: str = "variance_epsilon"
    norm_offset: float = 0.0
    rotates: str | None = None
    softcap: str | None = None
    residual_scale: str | None = None


_HEADS = ("q_norm", "k_norm")
_PLAIN = LayerParts()
_BEHIND = LayerParts(before=(), behind=("post_attention_layernorm", "post_feedforward_layernorm"), head_norms=_HEADS)
_GEMMA = LayerParts(epsilon="eps", norm_offset=1.0)
_GEMMA_2 = replace(
    _GEMMA, before=("input_layernorm", "pre_feedforward_layernorm"), behind=_BEHIND.behind,
    softcap="attn_logit_softcapping",
)  # fmt: skip

LAYERS: Mapping[str, LayerParts] = {
    "Gemma2DecoderLayer": _GEMMA_2,
    "Gemma3DecoderLayer": replace(_GEMMA_2, head_norms=_HEADS, softcap=None),
    "GemmaDecoderLayer": _GEMMA,
    "GraniteDecoderLayer": replace(_PLAIN, residual_scale="residual_multiplier"),
    "LlamaDecoderLayer": _PLAIN,
    "MinistralDecoderLayer": _PLAIN,
    "MistralDecoderLayer": _PLAIN,
    "Olmo2DecoderLayer": _BEHIND,
    "Olmo3DecoderLayer": _BEHIND,
    "Qwen2DecoderLayer": _PLAIN,
    "Qwen3DecoderLayer": replace(_PLAIN, head_norms=_HEADS),
    "SmolLM3DecoderLayer": replace(_PLAIN, rotates="use_rope"),
}

_TANH = 2 * math.sqrt(2 / math.pi)
#: Activations `g σ(g (slope + cubic g²))` by their class. GELU (arXiv 1606.08415) by tanh is one:
#: `(1 + tanh u) / 2 = σ(2 u)`.
GATES: Mapping[type[nn.Module], tuple[float, float]] = {
    GELUTanh: (_TANH, 0.044715 * _TANH),
    SiLUActivation: (1.0, 0.0),
    nn.SiLU: (1.0, 0.0),
}
