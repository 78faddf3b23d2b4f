"""Mixtures of experts, whose weights are one parameter of all of them: LoRA on them, and who may not have it."""

import pytest
import torch
import transformers
from compare import assert_same, error, gradients
from oracle import batch
from peft import LoraConfig, get_peft_model
from test_own_forward import DAG, SIZES, TOLERANCE, system_of, wide  # noqa: F401
from tiny_models import arguments, clone, ragged, with_lora

from diffmas.agents.topology import TOPOLOGIES
from diffmas.embedded.tokenizer import build_tokenizer
from diffmas.loading import build_system
from diffmas.models.dropout import Silenced
from diffmas.models.errors import UnsupportedModelError
from diffmas.prompts import Prompts
from diffmas.runs.settings import SystemArguments
from diffmas.system import MultiAgentSystem

EXPERTS = {
    "Olmoe": dict(num_experts=4, num_experts_per_tok=2, clip_qkv=0.4),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "GraniteMoe": dict(num_local_experts=4, num_experts_per_tok=2, logits_scaling=4.0, embedding_multiplier=3.0),
    # Its attention is a mixture too: a query head for every chosen expert.
    "JetMoe": dict(num_local_experts=4, num_experts_per_tok=2, kv_channels=8),
    "Phimoe": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}


def model_of(family, **overrides):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | EXPERTS[family] | overrides)
    # Experts one by one: grouped products have no float64.
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "gate.weight" in name or "router" in name:
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("family", ["Olmoe", "Qwen3Moe", "Mixtral", "GraniteMoe", "JetMoe"])
def test_lora_on_fused_experts_is_exact(family, wide):  # noqa: F811
    model = with_lora(model_of(family).double())
    # PEFT has no LoRA for GraniteMoe's experts.
    on_experts = any("experts" in name for name, _ in model.named_parameters() if "lora_A" in name)
    assert on_experts == (family != "GraniteMoe")
    prompts, answers = ragged(list(DAG), 3)
    twin = clone(model)
    loss, logits = batch(twin, DAG, prompts, answers, handover="full", latent_steps=2)
    loss.backward()
    output = system_of(model)(*arguments(prompts, answers))
    output.loss.backward()
    assert error(output.loss, loss) <= TOLERANCE and error(output.logits, logits) <= TOLERANCE
    assert_same(gradients(model), gradients(twin), TOLERANCE)


def saved(family, folder):
    tokenizer = build_tokenizer()
    model_of(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["Qwen3Moe", "Phimoe"])
def test_all_linear_trains_is_saved_and_loads(family, tmp_path):
    settings = SystemArguments(model_name_or_path=saved(family, tmp_path / "base"), topology="relay", latent_steps=1)
    system, _ = build_system(settings)
    system.prompts = Prompts.load("reasoning")
    adapted = {n.split(".lora_")[0] for n, p in system.named_parameters() if p.requires_grad}
    assert (family == "Qwen3Moe") == any("experts" in name for name in adapted)
    assert not any("router" in name for name in adapted)
    for name, parameter in system.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    prompts, answers = ragged([a.name for a in system.topology.agents], 2)
    system(*arguments(prompts, answers)).loss.backward()
    assert all(p.grad is not None for p in system.parameters() if p.requires_grad)
    system.save_pretrained(tmp_path / "run")
    again = MultiAgentSystem.from_pretrained(tmp_path / "run")
    found, expected = (s.eval()(*arguments(prompts, answers)).loss for s in (again, system))
    torch.testing.assert_close(found, expected)


def test_lora_on_a_router_that_is_no_linear_layer_is_refused():
    model = get_peft_model(model_of("Phimoe"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match=r"LoRA is on .*mlp\.router, a PhimoeTopKRouter, whose forward"):
        system_of(model)


def test_a_mask_of_the_layer_s_own_is_refused():
    """In a new model it is the same everywhere, like that of a window."""
    with pytest.raises(UnsupportedModelError, match="layer 0 of DogeForCausalLM has an attention mask of its own"):
        system_of(transformers.DogeForCausalLM(transformers.DogeConfig(**SIZES)))


def test_routers_that_sample_choose_as_in_evaluation():
    """Phi-3.5-MoE mixes experts that are within `router_jitter_noise`, in evaluation too, and samples in training."""
    model = model_of("Phimoe", router_jitter_noise=0.3)
    ids = torch.arange(1, 13)
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0, 7:11]
    system = MultiAgentSystem(model, TOPOLOGIES["single"])
    with pytest.warns(Silenced, match="PhimoeTopKRouter samples experts in training; here it chooses as in evaluation"):
        system.train()
    for mode in (True, False):
        logits = system.train(mode)([ids[:8]], [[8]], ids[8:12], [4]).logits
        assert error(logits.detach(), expected) <= 1e-5
