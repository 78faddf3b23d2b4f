"""What liger-kernel is asked to patch, and when it is refused; its kernels need a GPU."""

import pytest
import torch
from tiny_models import causal_lm, with_lora
from transformers.models.qwen3 import modeling_qwen3

from diffmas import train
from diffmas.agents.topology import TOPOLOGIES
from diffmas.models import liger
from diffmas.models.liger import fuse_liger
from diffmas.system import MultiAgentSystem

CUDA = torch.device("cuda")


def system():
    model = with_lora(causal_lm("qwen3", dtype=torch.float32), embeddings=False)
    return MultiAgentSystem(model, TOPOLOGIES["relay"], latent_steps=1)


def test_refusals(monkeypatch):
    model = system().agent_model.model
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install liger-kernel"):
        fuse_liger(model, CUDA)
    monkeypatch.setattr(liger, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="use_liger_kernel is True on cpu; allowed: False"):
        fuse_liger(model, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"liger_kernel_config has \['cross_entropy'\]; allowed: rope, rms_norm, swiglu"
    ):
        fuse_liger(model, CUDA, {"cross_entropy": True})


def test_the_training_program_refuses_before_it_writes(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(liger, "find_spec", lambda name: name)
    assert train.main(flags(use_liger_kernel=True)) == 2
    assert "use_liger_kernel is True on cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_which_modules_are_patched(monkeypatch):
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    patched = system()
    decoder = patched.agent_model.language_model.get_decoder()
    layer = decoder.layers[0]
    before = layer.mlp.gate_proj.forward
    own = patched.agent_model.language_model.forward
    fuse_liger(patched.agent_model.model, CUDA)
    norms = (decoder.norm, layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.q_norm)
    assert all(norm.forward.__func__ is LigerRMSNorm.forward for norm in norms)
    assert layer.mlp.forward.__func__ is LigerSwiGLUMLP.forward
    assert modeling_qwen3.apply_rotary_pos_emb is liger_rotary_pos_emb
    # LoRA layers keep their fused forward, the model its own loss.
    assert layer.mlp.gate_proj.forward == before and before.func.__module__ == "diffmas.models.lora"
    assert patched.agent_model.language_model.forward == own
    fuse_liger(patched.agent_model.model, CUDA, {"rope": False})
    patched.agent_model.model.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match="no kernels for models of type 'unheard-of'"):
        fuse_liger(patched.agent_model.model, CUDA)
