"""A base in 4 bits: trains an adapter over it, which loads in evaluation; says what to install."""

import importlib.util

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from diffmas import train
from diffmas.loading import load_run


def test_what_to_install(flags, capsys, monkeypatch):
    monkeypatch.setattr("diffmas.models.pretrained.find_spec", lambda name: None)
    assert train.main(flags(quantization="4bit")) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_trains_and_loads(flags, base, tmp_path):
    from peft.tuners.lora.bnb import Linear4bit

    # Its CPU kernels take sizes in blocks.
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    changes = dict(model=tmp_path / "base", quantization="4bit", max_steps=2, eval_size=4)
    assert train.main(flags(**changes)) == 0
    system = load_run(tmp_path / "run").system
    layers = [m for m in system.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14 and all("forward" not in vars(m) for m in layers)
    assert {p.dtype for p in system.parameters() if p.requires_grad} == {torch.float32}
    assert any(m.lora_B["default"].weight.any() for m in layers)
