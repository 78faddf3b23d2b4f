"""Tiny random language models and ragged batches for the system tests."""

from __future__ import annotations

import copy
import types

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from diffmas.models.decoder_layer import FusedLayer

VOCAB = 37
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}


def _norm(self, hidden):
    # transformers takes the mean square in float32 even in a float64 model, in an order that depends on the shape.
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def causal_lm(family: str, *, tied: bool = False, dtype=torch.float64, seed: int = 0, **overrides):
    """A two-layer model with grouped queries; in float64, its norms compute in float64 too."""
    config_class, model_class, options = FAMILIES[family]
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    model = model_class(config_class(**(sizes | options | overrides))).to(dtype)
    if dtype == torch.float64:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.forward = types.MethodType(_norm, module)
    return model


def with_lora(model, *, embeddings: bool = True, targets="all-linear", adapters=()):
    """LoRA whose B matrices are not zero, and (unless told otherwise) trainable input embeddings.

    `adapters`: names of those beside the default one.
    """
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name in adapters:
        model.add_adapter(name, model.peft_config["default"])
    model = model.to(model.get_base_model().dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.2 * draw)
    if embeddings:
        model.get_base_model().get_input_embeddings().weight.requires_grad_()
    return model


def clone(model):
    """A copy in evaluation mode with transformers' own SDPA attention (its eager one takes the softmax in float32)."""
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        # The model's own forward, where a system has put a fused one in place.
        if getattr(getattr(vars(module).get("forward"), "func", None), "__module__", "").startswith("diffmas"):
            del module.forward
        if isinstance(module, FusedLayer):
            module.__class__ = type(module).__mro__[type(module).__mro__.index(FusedLayer) + 1]
    (twin.get_base_model() if hasattr(twin, "get_base_model") else twin).set_attn_implementation("sdpa")
    return twin


def ragged(names, rows: int, *, seed: int = 0, longest: int = 11):
    """Prompts by agent and answers, each a list of one int64 tensor a row, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(least, most):
        n = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(0, VOCAB, (n,), generator=generator)

    prompts = {name: [tokens(1, longest) for _ in range(rows)] for name in names}
    # A row of the shortest next to a row of the longest, whatever was drawn.
    for name in names[::2]:
        prompts[name][0] = tokens(1, 1)
    if rows > 1:
        prompts[names[0]][1] = tokens(longest, longest)
    return prompts, [tokens(1, 5) for _ in range(rows)]


def packed(rows):
    """`(ids, lengths)` of a list of rows."""
    return torch.cat(rows), [len(row) for row in rows]


def arguments(prompts, answers):
    """What MultiAgentSystem.forward takes."""
    ids, lengths = zip(*(packed(rows) for rows in prompts.values()), strict=True)
    return list(ids), list(lengths), *packed(answers)
