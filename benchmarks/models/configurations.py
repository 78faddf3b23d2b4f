"""Small configurations of the decoders of transformers, and models of them whose every weight is random.

A family is built in two layouts: "own", its default pattern of layers with every kind of layer once, windows made
short; and "full", the same with attention over everything in every layer. Where the two are one there is only "own".
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.models.precision import widened
from diffmas.models.wrapper import needs_unwrapping, unwrapped

LAYOUTS = ("full", "own")
VOCAB, WINDOW = 37, 5
#: What every configuration gets that has it, by value.
_SIZES: dict[Any, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input embedding_size_vocab",
    32: "hidden_size n_embd d_model dim n_embed hidden_dim word_embed_proj_dim embedding_size",
    48: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff decoder_ffn_dim encoder_ffn_dim block_ff_dim "
    "intermediate_size_mlp lru_width ffn_hidden_dim dense_intermediate_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank o_lora_rank prefix_dense_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts mamba_d_conv "
    "linear_num_value_heads index_n_heads",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_top_k top_k_experts moe_topk moe_k "
    "linear_num_key_heads encoder_layers decoder_layers depth swa_num_key_value_heads",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state "
    "mamba_chunk_size index_head_dim swa_head_dim swa_v_head_dim kv_channels d_kv",
    1: "n_shared_experts num_shared_experts n_group topk_group moe_num_shared_experts first_k_dense_replace",
    WINDOW: "sliding_window attention_chunk_size local_window_size attention_window_size local_attention window_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length",
    0.0: "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout activation_dropout "
    "embedding_dropout residual_dropout attention_probs_dropout_prob hidden_dropout_prob resid_dropout "
    "attn_dropout layerdrop decoder_layerdrop encoder_layerdrop classifier_dropout router_jitter_noise "
    "input_jitter_noise ffn_dropout attention_dropout_prob final_dropout emb_dropout summary_first_dropout",
}
TINY = {name: value for value, names in _SIZES.items() for name in names.split()}
#: Set even where the default is None.
_ALWAYS = ("num_key_value_heads", "num_kv_heads", "vocab_size", "head_dim", "num_experts_per_tok", "n_routed_experts",
           "n_shared_experts")  # fmt: skip
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
#: Per-layer patterns as the "full" layout has them.
_FULL = {"layer_types": "full_attention", "no_rope_layers": 1}
#: What the rules above do not find, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 10, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"query_pre_attn_scalar": 10},
    "vaultgemma": {"query_pre_attn_scalar": 10, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3n_text": {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0},
    # Without inputs by layer, which a latent step has no token for.
    "gemma4_text": {"hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_global_key_value_heads": 1,
                    "num_kv_shared_layers": 0, "pad_token_id": 0},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_kv_shared_layers": 0},
    "modernbert-decoder": {"pad_token_id": 0},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "granite": {"embedding_multiplier": 1.7, "residual_multiplier": 0.6, "logits_scaling": 1.5,
                "attention_multiplier": 0.3},
    "granitemoe": {"embedding_multiplier": 1.7, "residual_multiplier": 0.6, "logits_scaling": 1.5,
                   "attention_multiplier": 0.3},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "opt": {"do_layer_norm_before": True},
    "jamba": {"mamba_dt_rank": 4, "use_mamba_kernels": False, "expert_layer_period": 2, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_ssm": 64,
                  "lm_head_multiplier": 0.6, "embedding_multiplier": 1.7, "mlp_multipliers": [0.8, 1.3],
                  "key_multiplier": 0.7, "attention_out_multiplier": 1.2, "attention_in_multiplier": 0.9,
                  "ssm_multipliers": [0.8, 1.1, 0.7, 1.2, 0.9], "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "num_hidden_layers": 3,
                         "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                         "embedding_multiplier": 1.7, "residual_multiplier": 0.6, "logits_scaling": 1.5,
                         "attention_multiplier": 0.3},
    "minimax": {"full_attn_alpha_factor": 1.3, "full_attn_beta_factor": 0.8, "linear_attn_alpha_factor": 1.2,
                "linear_attn_beta_factor": 0.7, "mlp_alpha_factor": 1.1, "mlp_beta_factor": 0.9},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
                           "mlp_layer_types": ["dense", "sparse", "sparse"], "num_hidden_layers": 3,
                           "index_n_heads": 2, "index_block_size": 4, "index_topk_blocks": 1, "rotary_dim": 4},
    # As Phi-4 has it: three quarters of a head turn.
    "phi3": {"pad_token_id": 0,
             "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "nemotron_h": {"chunk_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    # Their positions are counted from the padding token.
    **dict.fromkeys(
        ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        {"pad_token_id": 1},
    ),
}  # fmt: skip


class Unbuilt(Exception):
    """A family that these configurations do not build; the message says why."""


def families() -> list[str]:
    """Model types with a causal language model, then those of image-text models alone."""
    causal = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return causal + [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in causal]


def model_class(family: str) -> type[PreTrainedModel]:
    """The class of `family`'s causal language model."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family]
    return getattr(transformers, name)


def configuration(family: str, layout: str) -> PreTrainedConfig:
    """A small configuration of `family`.

    Raises:
        Unbuilt: a configuration class that refuses the small sizes, or has no layer it could be made small by.
    """
    kind = model_class(family).config_class or CONFIG_MAPPING[family]
    try:
        return _small(kind, layout)
    except Exception as error:
        raise Unbuilt(f"configuration: {type(error).__name__}: {_line(error)}") from error


def causal_lm(family: str, layout: str, seed: int = 0) -> PreTrainedModel:
    """A random model of `family`, of wrappers the text decoder: float64, no dropout, eager experts and attention.

    Raises:
        Unbuilt: no such model can be made. UnsupportedModelError: one that wraps what is no causal language model.
    """
    config = configuration(family, layout)
    torch.manual_seed(seed)
    try:
        # Frequencies that a model computes once are then those that another computes in every forward.
        with widened():
            model = model_class(family)(config).double()
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
    except Exception as error:
        raise Unbuilt(f"model: {type(error).__name__}: {_line(error)}") from error
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.eos_token_id = None
    randomise(model, seed)
    if not needs_unwrapping(model.config):
        return model
    with widened():
        return unwrapped(model)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Every weight drawn anew: matrices to unit gain, vectors and scalars (norms, biases, scales) around what they are.

    Buffers that belong to the model's state (corrections of routers, scales of layers) move too.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = model.state_dict(keep_vars=True)
    parameters = {id(p): p for p in (*model.parameters(), *kept.values()) if p.is_floating_point()}
    for tensor in parameters.values():
        draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.dim() > 1:
            tensor.copy_(draw * tensor.shape[-1] ** -0.5)
        else:
            tensor.copy_(torch.nan_to_num(tensor, 1.0, 1.0, 1.0).clamp(-10, 10) + 0.3 * draw)


def _fields(kind: type[PreTrainedConfig]) -> list[str]:
    return [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "kwargs")]


def _small(kind: type[PreTrainedConfig], layout: str) -> PreTrainedConfig:
    default, fields = kind(), _fields(kind)
    # Some configurations refuse to be asked for what differs between their layers.
    values = default.to_dict()
    annotations = inspect.signature(kind.__init__).parameters
    changes: dict[str, Any] = {}
    for name in fields:
        value = values.get(name)
        if name in kind.sub_configs and value is not None:
            changes[name] = _small(type(getattr(default, name)), layout)
        elif name in TINY and (value is not None or name in _ALWAYS) and not isinstance(value, (list, dict)):
            changes[name] = TINY[name] if value is None else type(value)(TINY[name])
        elif name in _TOKENS:
            changes[name] = None if "None" in str(annotations[name].annotation) else 0
    if "kv_lora_rank" in fields and "num_key_value_heads" in changes:
        # Latent attention has a key head for each query head.
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    if "is_decoder" in fields:
        changes["is_decoder"] = True
    changes |= _layers(values, fields, layout)
    own = OVERRIDES.get(kind.model_type, {})
    changes |= {name: value for name, value in own.items() if name in fields}
    if layout == "full" and "layer_types" in own:
        changes["layer_types"] = [_FULL["layer_types"]] * len(own["layer_types"])
    if layout == "full" and "layer_types" not in changes and "sliding_window" in changes:
        changes["sliding_window"] = None
    return kind(**changes)


def _layers(values: dict[str, Any], fields: list[str], layout: str) -> dict[str, Any]:
    """Depth and per-layer patterns: one layer of each kind, and one more of the first kind behind them."""
    depth = next((name for name in _DEPTH if name in fields), None)
    if depth is None:
        return {}
    count = values[depth]
    patterns = {
        name: list(value)
        for name in fields
        if isinstance(value := values.get(name), (list, tuple)) and len(value) == count
    }
    kinds = list(zip(*patterns.values(), strict=True)) if patterns else [()] * count
    seen: dict[str, int] = {}
    for index, kind in enumerate(kinds):
        seen.setdefault(repr(kind), index)
    chosen = list(seen.values())[:5]
    chosen.append(chosen[0])
    changes: dict[str, Any] = {depth: len(chosen)}
    for name, pattern in patterns.items():
        kept = [pattern[index] for index in chosen]
        changes[name] = [_FULL[name]] * len(kept) if layout == "full" and name in _FULL else kept
    return changes


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
