"""What is done to a model after a system was made on it, or to it before, is served or refused, never ignored."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from compare import error, gradients
from peft import (
    CPTConfig,
    LilyConfig,
    LoraConfig,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    PveraConfig,
    VeloraConfig,
    get_peft_model,
)
from tiny_models import arguments, causal_lm, clone, ragged, with_lora
from torch.nn.utils import parametrize
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from diffmas.agents.topology import TOPOLOGIES, load_topology
from diffmas.models.errors import UnsupportedModelError
from diffmas.models.lora import _TOKEN_BY_TOKEN
from diffmas.models.pretrained import load_base
from diffmas.system import MultiAgentSystem

SIZES = dict(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
)  # fmt: skip


def relay(model, **options):
    return MultiAgentSystem(model, load_topology("relay", "latent"), latent_steps=2, **options)


def rows(count=3, longest=29):
    return ragged(["sender", "solver"], count, longest=longest)


def logits(system, prompts, answers):
    with torch.no_grad():
        return system(*arguments(prompts, answers)).logits


def test_queries_are_scaled_by_position_and_not_by_place():
    """Llama 4 counts from the first token of a forward, which a packed call of many rows has only one of."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **SIZES, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=24, no_rope_layers=[1, 0],
        attention_chunk_size=64, max_position_embeddings=128, floor_scale=9, attn_scale=0.5,
    )  # fmt: skip
    system = MultiAgentSystem(Llama4ForCausalLM(config).double(), TOPOLOGIES["relay"], latent_steps=2)
    prompts, answers = rows()
    together = logits(system, prompts, answers).split([len(a) for a in answers])
    for b, row in enumerate(together):
        alone = logits(system, {n: [p[b]] for n, p in prompts.items()}, [answers[b]])
        # Its norms compute in float32.
        assert error(row, alone) <= 1e-6


@pytest.mark.parametrize("changing", ["full_attention", "sliding_attention"])
def test_frequencies_that_begin_alike_are_told_apart(changing):
    kinds = {
        name: dict(rope_type="dynamic", rope_theta=1e4, factor=4.0) if name == changing
        else dict(rope_type="default", rope_theta=1e4)
        for name in ("full_attention", "sliding_attention")
    }  # fmt: skip
    config = Gemma3TextConfig(
        **SIZES, sliding_window=64, max_position_embeddings=8, rope_parameters=kinds,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    system = MultiAgentSystem(Gemma3ForCausalLM(config).double(), load_topology("relay", "full"), latent_steps=2)
    with pytest.raises(UnsupportedModelError, match="beyond position 8, where frequencies of rope_type 'dynamic'"):
        logits(system, *rows())


@pytest.mark.parametrize(
    "config, what",
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "a PromptTuningConfig, which puts learned"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "a PrefixTuningConfig, which puts learned"),
        (CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]),
         "a CPTConfig, which puts learned"),
        (LoraConfig(r=2, target_modules="all-linear", alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
         "an activated LoRA"),
        (LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)], task_type="CAUSAL_LM"),
         "a LoraConfig with layer_replication"),
        (LoraConfig(r=2, target_modules=["q_proj"], velora_config=VeloraConfig(), task_type="CAUSAL_LM"),
         "a LoraConfig with velora_config"),
        # These look at other tokens of a call, and at a generator of random numbers.
        (LilyConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "of PEFT's kind LILY"),
        (PveraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "of PEFT's kind PVERA"),
    ],
)  # fmt: skip
def test_adapters_outside_the_layers_are_refused(config, what):
    family = "llama" if getattr(config, "layer_replication", None) else "qwen3"
    model = get_peft_model(causal_lm(family, dtype=torch.float32), config)
    with pytest.raises(UnsupportedModelError, match=f"adapter 'default' is {what}"):
        relay(model)


def test_kinds_of_adapters_are_called_as_peft_calls_them():
    assert {kind.value for kind in PeftType} >= _TOKEN_BY_TOKEN


def _hook(module, *rest):
    return None


@pytest.mark.parametrize(
    "place, change",
    [
        ("", lambda m: m.register_forward_hook(_hook)),
        ("base_model", lambda m: m.register_forward_pre_hook(_hook)),
        ("base_model.model", lambda m: m.register_forward_hook(_hook)),
        ("base_model.model", lambda m: setattr(m, "forward", lambda *a, **k: type(m).forward(m, *a, **k))),
    ],
)
def test_what_would_not_run_around_the_decoder_is_refused(place, change):
    model = with_lora(causal_lm("qwen3"))
    change(model.get_submodule(place))
    with pytest.raises(UnsupportedModelError, match="(a hook|a forward .*) on .* would not run: agents call its dec"):
        relay(model)


@pytest.mark.parametrize(
    "options",
    [dict(target_modules=["q_proj", "embed_tokens"]), dict(target_modules=["q_proj"], trainable_token_indices=[1])],
)
def test_an_adapter_on_the_input_embedding_is_refused(options):
    model = get_peft_model(causal_lm("qwen3"), LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with pytest.raises(UnsupportedModelError, match="an adapter is on the input embedding .*modules_to_save"):
        relay(model)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
@pytest.mark.parametrize("alignment", ["identity", "ridge"])
def test_a_run_with_trained_embeddings_is_loaded_as_it_was(saved, alignment, tmp_path):
    base, tokenizer = load_base(None)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    system = relay(base, tokenizer=tokenizer, alignment=alignment, peft_config=lora).eval()
    torch.manual_seed(0)
    for name, parameter in system.named_parameters():
        if "modules_to_save" in name and parameter.requires_grad:  # stands for training
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    before = logits(system, *rows())
    system.save_pretrained(tmp_path / "run")
    assert torch.equal(logits(MultiAgentSystem.from_pretrained(tmp_path / "run"), *rows()), before)


@pytest.mark.parametrize("place", ["mlp", "self_attn", "input_layernorm", "mlp.up_proj", "mlp.up_proj.lora_A.default"])
def test_a_forward_that_was_replaced_runs(place):
    system = relay(clone(with_lora(causal_lm("qwen3"))))
    plain = logits(system, *rows())
    for layer in system.agent_model.language_model.model.layers:
        module = layer.get_submodule(place)
        before = module.forward
        module.forward = lambda *a, before=before, **k: _halved(before(*a, **k))
    found = logits(system, *rows())
    reference = logits(relay(system.agent_model.model, backend="reference"), *rows())
    assert error(found, plain) > 1e-3 and error(found, reference) <= 1e-10


def _halved(result):
    return (result[0] / 2, *result[1:]) if isinstance(result, tuple) else result / 2


class _Tripled(torch.nn.Module):
    def forward(self, weight):
        return 3 * weight


@pytest.mark.parametrize("place", ["input_layernorm", "self_attn.q_norm", "mlp.up_proj.lora_A.default"])
def test_a_weight_that_is_computed_is_computed_anew(place):
    system = relay(clone(with_lora(causal_lm("qwen3"))))
    for layer in system.agent_model.language_model.model.layers:
        parametrize.register_parametrization(layer.get_submodule(place), "weight", _Tripled())
    before = logits(system, *rows())
    for layer in system.agent_model.language_model.model.layers:
        layer.get_submodule(place).parametrizations.weight.original.data.mul_(-2)
    found = logits(system, *rows())
    assert error(found, before) > 1e-3
    assert error(found, logits(relay(system.agent_model.model, backend="reference"), *rows())) <= 1e-10
    system.zero_grad()
    for _ in range(2):
        system(*arguments(*rows())).loss.backward()
    assert gradients(system)


def test_another_attention_implementation_is_refused():
    system = relay(causal_lm("qwen3"))
    system.agent_model.language_model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="attention implementation is 'eager' now, which reads no trace"):
        logits(system, *rows())


def test_a_configuration_edited_afterwards():
    """Another system on the model reads it anew; the one that is there stops."""
    model, prompts = causal_lm("mistral", sliding_window=None), rows()
    first = relay(model)
    model.config.sliding_window = 4
    with pytest.raises(UnsupportedModelError, match="sliding_window .* is 4 now, and was None .*allowed: a new system"):
        logits(first, *prompts)
    again, fresh = (logits(relay(m), *prompts) for m in (model, causal_lm("mistral", sliding_window=4)))
    assert error(again, fresh) <= 1e-12


@pytest.mark.parametrize("another", [False, True])
def test_frequencies_changed_afterwards(another):
    """Keys that move turn by the frequencies with which others are written."""
    model, fresh = (causal_lm("qwen3") for _ in range(2))
    system, prompts = relay(model), rows()
    for changed in (model, fresh):
        rotary = changed.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq * 0.7
    found, expected = (logits(s, *prompts) for s in (relay(model) if another else system, relay(fresh)))
    assert error(found, expected) <= 1e-12


def test_layers_replaced_between_systems_are_compared_anew():
    model = causal_lm("qwen3")
    relay(model)

    class Pooling(type(model.model.layers[1].mlp)):
        def forward(self, x):
            return super().forward(x) + x.mean(1, keepdim=True)

    model.model.layers[1].mlp.__class__ = Pooling
    with pytest.raises(UnsupportedModelError, match="mixes rows"):
        relay(model)


def test_rows_that_would_change_each_other_s_frequencies():
    """By every kind's own limit, which running the model finds, whatever the rope type says."""
    kinds = {
        name: dict(
            rope_type="longrope", rope_theta=1e4, factor=4.0, original_max_position_embeddings=limit,
            short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 3.0, 4.0],
        )
        for name, limit in (("full_attention", 8), ("sliding_attention", 24))
    }  # fmt: skip
    config = Gemma3TextConfig(
        **SIZES, sliding_window=64, max_position_embeddings=128, rope_parameters=kinds, layer_types=list(kinds)
    )
    prompts, answers = rows()
    prompts["sender"] = [torch.arange(n) for n in (10, 30, 12)]
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="both sides of position 24, where .* 'longrope'"):
        logits(MultiAgentSystem(Gemma3ForCausalLM(config).double(), load_topology("relay", "full")), prompts, answers)
    linear = dict(rope_type="linear", factor=2.0, rope_theta=1e4, original_max_position_embeddings=24)
    config = PhimoeConfig(
        **{k: v for k, v in SIZES.items() if k != "head_dim"}, num_local_experts=2, num_experts_per_tok=1,
        max_position_embeddings=128, rope_parameters=linear | {"short_mscale": 1.0, "long_mscale": 2.0},
    )  # fmt: skip
    model = PhimoeForCausalLM(config).double()
    # Its grouped products have no float64.
    model.config._experts_implementation = "eager"
    with pytest.raises(UnsupportedModelError, match="both sides of position 24, where .* 'linear'"):
        logits(MultiAgentSystem(model, load_topology("relay", "full")), prompts, answers)


def test_offloaded_layers_and_copied_configurations():
    """Hooks that move inputs, and layers that an adapter copied whole, still attend through the trace."""
    prompts = rows()
    expected = logits(relay(causal_lm("llama")), *prompts)
    offloaded = causal_lm("llama")
    for layer in offloaded.model.layers:
        cpu_offload(layer, torch.device("cpu"))
    assert error(logits(relay(offloaded), *prompts), expected) <= 1e-12
    copied = LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["self_attn"], task_type="CAUSAL_LM")
    adapted = get_peft_model(causal_lm("llama"), copied).double()
    assert error(logits(relay(adapted), *prompts), expected) <= 1e-12


def test_a_model_on_no_device():
    with torch.device("meta"):
        model = causal_lm("llama", dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM is on the meta device"):
        relay(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda system: pickle.loads(pickle.dumps(system))])
def test_a_soft_alignment_follows_the_head(copied):
    # In float64, the norms of the tests' models cannot be pickled.
    first = relay(causal_lm("qwen3", dtype=torch.float32), alignment="soft").eval()
    before = logits(first, *rows())
    system = copied(first)
    torch.manual_seed(5)
    system.agent_model.language_model.set_output_embeddings(torch.nn.Linear(16, 37, bias=False))
    found = logits(system, *rows())
    expected = logits(relay(clone(system.agent_model.model), alignment="soft").eval(), *rows())
    assert error(found, before) > 1e-3 and error(found, expected) <= 1e-4
    assert torch.equal(logits(first, *rows()), before)


def _lora_on_head(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), "b")


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda m: m.lm_head.register_forward_hook(lambda m, x, y: 3 * y), "the model's head has hooks"),
        (lambda m: setattr(m.lm_head, "forward", lambda x: x), "the model's head has a forward that was put in place"),
        (_lora_on_head, "the model's head is a peft.*Linear, not a torch.nn.Linear"),
        (lambda m: m.set_output_embeddings(torch.nn.Linear(16, 41).double()), "37 input embeddings and a head for 41"),
        (lambda m: m.set_input_embeddings(torch.nn.Embedding(37, 16).double()), "another input embedding, or other ho"),
        (lambda m: m.get_input_embeddings().register_forward_hook(_hook), "another input embedding, or other hooks"),
    ],
)
def test_a_soft_alignment_refuses_what_it_does_not_see(change, why):
    system = relay(causal_lm("qwen3"), alignment="soft")
    logits(system, *rows())
    change(system.agent_model.language_model)
    with pytest.raises(UnsupportedModelError, match=why):
        logits(system, *rows())


def test_a_soft_alignment_reads_a_head_that_accelerate_has_placed():
    model = causal_lm("qwen3")
    expected = logits(relay(clone(model), alignment="soft").eval(), *rows())
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device=torch.device("cpu")))
    assert error(logits(relay(model, alignment="soft").eval(), *rows()), expected) <= 1e-10


@pytest.mark.parametrize("alignment", ["identity", "soft"])
def test_a_scale_of_logits_that_changed_is_refused(alignment):
    config = GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=2.0)
    system = relay(GraniteForCausalLM(config), alignment=alignment)
    logits(system, *rows())
    config.logits_scaling = 4.0
    with pytest.raises(UnsupportedModelError, match="has logits_scaling 4.0, and had 2.0 when the system was made"):
        logits(system, *rows())


@pytest.mark.parametrize("edit", ["layer_types", "rope_parameters"])
def test_a_configuration_edited_in_place(edit):
    kinds = ["sliding_attention", "full_attention"]
    model, prompts = causal_lm("qwen2", use_sliding_window=True, sliding_window=4, layer_types=list(kinds)), rows()
    system = relay(model)
    if edit == "layer_types":
        model.config.layer_types[0] = "full_attention"
    else:
        model.config.rope_parameters["rope_theta"] = 5.0
    with pytest.raises(UnsupportedModelError, match=f"{edit} in the model's configuration is .* allowed: a new system"):
        logits(system, *prompts)


def test_what_else_asks_for_a_system():
    """In inference mode, with hooks that only watch or ask for gradients, between a forward and its backward."""
    model, prompts = causal_lm("qwen3", attention_dropout=0.1), rows()
    with torch.inference_mode():
        first = relay(model)
    loss = first(*arguments(*prompts)).loss
    relay(model)
    loss.backward()
    soft = relay(causal_lm("qwen3"), alignment="soft")
    expected = logits(soft, *prompts)
    soft.agent_model.language_model.enable_input_require_grads()
    watching = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert error(logits(soft, *prompts), expected) <= 1e-12
    finally:
        watching.remove()


def test_another_attempt_on_other_weights():
    """What a refused attempt left says nothing of weights that were loaded since."""
    model, weights = causal_lm("qwen3"), causal_lm("qwen3", seed=1).state_dict()
    with pytest.raises(ValueError, match="alignment_top_k"):
        relay(model, alignment="soft", alignment_top_k=1000)
    model.load_state_dict(weights)
    relay(model)
