"""Tiny language models with recurrent layers, and an oracle that runs every row alone, in one forward."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
import transformers
from tiny_models import VOCAB
from torch import Tensor

_SIZES = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=False,
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
_DELTA = dict(
    head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=4, linear_value_head_dim=4,
    linear_conv_kernel_dim=4, layer_types=_LAYERS,
)  # fmt: skip
# Chunks shorter than most prompts, so that a state passes through several.
_MAMBA2 = dict(
    mamba_n_heads=4, mamba_d_head=8, mamba_d_state=6, mamba_n_groups=2, mamba_d_conv=4, mamba_expand=2,
    mamba_chunk_size=4,
)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
#: Name of the classes, and how its configuration differs.
FAMILIES = {
    "qwen3_next": (
        "Qwen3Next", _DELTA | _EXPERTS | dict(moe_intermediate_size=8, shared_expert_intermediate_size=8),
    ),
    "qwen3_5": ("Qwen3_5", _DELTA),
    "bamba": ("Bamba", _MAMBA2 | dict(attn_layer_indices=[1])),
    "granite": (
        "GraniteMoeHybrid",
        _MAMBA2 | dict(layer_types=_LAYERS, shared_intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    ),
    # Attention and a state space in every layer.
    "falcon_h1": ("FalconH1", _MAMBA2 | dict(mamba_d_ssm=32)),
    "lfm2": (
        "Lfm2", dict(layer_types=["conv", "full_attention", "conv"], conv_L_cache=3, block_auto_adjust_ff_dim=False),
    ),
    # Its code for several tokens begins at zero, and its layers do not hand on what they are given.
    "jamba": (
        "Jamba",
        _EXPERTS | dict(
            attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=6,
            mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=3,
        ),
    ),
    # No positions, layers without attention or state, and time steps with a limit.
    "nemotron_h": (
        "NemotronH",
        dict(
            head_dim=8, layers_block_type=["linear_attention", "full_attention", "mlp", "linear_attention"],
            num_hidden_layers=4, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=6, n_groups=2, conv_kernel=4,
            expand=2, chunk_size=4, time_step_min=0.4,
        ),
    ),
}  # fmt: skip
#: Where PEFT puts adapters; it refuses the projections behind a state space.
TARGETS = [
    *("q_proj", "k_proj", "v_proj", "in_proj", "in_proj_qkvz", "in_proj_qkv", "in_proj_ba", "x_proj", "gate_proj"),
    *("up_proj", "down_proj"),
]


def hybrid(family: str, **overrides):
    """A float64 model whose biases, norms, decays and routers are no ones and zeros."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**(_SIZES | options | overrides))).double()
    # The grouped products have no float64.
    model.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(5)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1 or parameter_name.endswith(("A_log", "gate.weight", "router.weight")):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(noise, alpha=1 if "weight" in parameter_name and parameter.dim() > 1 else 0.3)
    return model


@contextlib.contextmanager
def in_double():
    """What transformers computes in float32 whatever the model's dtype, in float64."""
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved


def read(model, inputs: list[Tensor]) -> Tensor:
    """Hidden states `[tokens, hidden]` of one forward over embeddings, without a cache."""
    return model.get_decoder()(inputs_embeds=torch.cat(inputs)[None], use_cache=False).last_hidden_state[0]


def chain(model, prompts: list[Tensor], latent_steps: int) -> list[Tensor]:
    """The inputs of one row up to the last prompt: token embeddings and latent inputs, in order."""
    embed = model.get_input_embeddings()
    rho = embed.weight.detach().norm(dim=1).mean()
    inputs = []
    for prompt in prompts[:-1]:
        inputs.append(embed(prompt))
        for _ in range(latent_steps):
            hidden = read(model, inputs)[-1]
            inputs.append((rho * hidden / hidden.norm())[None])
    return [*inputs, embed(prompts[-1])]


def batch(model, prompts: dict[str, list[Tensor]], answers: list[Tensor], latent_steps: int) -> tuple[Tensor, Tensor]:
    """Mean answer loss and packed logits of a chain of agents that continue each other's trace."""
    logits = []
    for row, answer in enumerate(answers):
        inputs = chain(model, [rows[row] for rows in prompts.values()], latent_steps)
        hidden = read(model, [*inputs, model.get_input_embeddings()(answer)])
        logits.append(model.get_output_embeddings()(hidden[-len(answer) - 1 : -1]))
    packed = torch.cat(logits)
    return F.cross_entropy(packed, torch.cat(answers)), packed
