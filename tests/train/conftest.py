"""A tiny random base model on disk, and the flags of a run that ends in seconds."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from diffmas.embedded.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def flags(base, tmp_path):
    """`flags(**changes)`: the command line of a 6-step relay run into `tmp_path / "run"`."""

    def build(**changes):
        values = dict(
            model=base, task="relay", topology="relay", latent_steps=2, max_steps=6, learning_rate=1e-2,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, per_device_eval_batch_size=4, eval_size=9,
            max_new_tokens=3, temperature=0, save_steps=2, disable_tqdm=True, use_cpu=True,
            output_dir=tmp_path / "run",
        )  # fmt: skip
        return [f"--{k}={v}" for k, v in (values | changes).items() if v is not None]

    return build
